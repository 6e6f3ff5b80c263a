"""Shared by all tests: the project's files on the path, one thread, and a tiny model."""
import os
import sys

import pytest
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.join(HERE, "bench")]
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture
def tiny():
    """A two-layer GPT over 40 tokens, its weights so large that its softmax is far from uniform."""
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=40, n_layer=2, n_embd=16, n_head=4, n_kv_head=2, head_dim=4,
                          mlp_dim=32, context=64))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(12)
    return model
