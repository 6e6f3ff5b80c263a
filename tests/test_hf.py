"""Hugging Face folders: the same logits as transformers, exact exports, and damaged files refused in one line."""
TEXTS = [  # the small tokenizers are trained on these
    "Use each of the numbers 3, 7 and 2 exactly once to make 20. What's (3 + 7) * 2?", "It's 100% right: 1,234.50 - 3/4 = 1233.75, isn't it?",
    "def f(x):\n    return x ** 2\n\n\nprint(f(12))  # 144", "<think>\nfirst 7 - 3 = 4, no\n</think>\n<answer>20</answer>", "naïve café, Straße, señor",
    "先想一想，再回答。答案是 20。", "Сначала подумай, потом ответь.", "   leading and trailing   \t tabs \n", "he'll we've I'D they're", "😀 👍🏽 ½ ² Ⅷ ٣",
]
STRANGE = [  # ... and must agree on these all the same
    "", " ", "\n", "  \n\n \r\n", "\t\t x", "a  b   c    12     3", "1234567890", " 1 2  3   4", "don't DON'T 's 'S !'s", "e\u0301 \u00e9 \u1100\u1161 \u2126", "\x00\x04\x1d\x7f",
    "!\x04! a\x04b 1\x041", "a's\x04 \x04  \x04\n\n\x04", "\U000f8e4e\U0009a546 \U00042345x", "\ufeffBOM \u200b \u00a0 \u2003 \u3000.", "<|im_start|>user\nhi<|im_end|>\n", "<think></think><|im_end",
    "<<|im_end|>>", "x<|endoftext|><|endoftext|>y", "ｆｕｌｌ ｗｉｄｔｈ １２", "שלום مرحبا हिन्दी ไทย", "👨‍👩‍👧‍👦", "_under_score__ CamelCase", "\\frac{1}{2} \\boxed{72} $18",
    "..." * 20, " " * 50 + "7", "a" * 300, "\n" * 30 + "x",
]
IDS = [3, 17, 60, 5, 5, 9, 33, 1, 0, 63] * 6  # 60 positions: past the original context of the llama3 fixture

import json
import os
import shutil

import pytest
import torch

from data import load_tokenizer
from model import GPT, BadInput, GPTConfig, config_from_hf, config_to_hf, from_pretrained, read_safetensors, save_pretrained

FIXTURES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fixtures")
NAMES = sorted(name for name in os.listdir(FIXTURES) if os.path.exists(os.path.join(FIXTURES, name, "config.json")))
TOKENIZERS = sorted(name for name in os.listdir(FIXTURES) if name.startswith("tokenizer_"))


def expected(name):
    return read_safetensors(os.path.join(FIXTURES, name, "expected.safetensors"))["logits"]


# ---------------------------------------------------------------------------------------- the same model


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers(name):
    got, want = GPT.from_pretrained(os.path.join(FIXTURES, name))(torch.tensor([IDS])), expected(name)
    assert want.std() > 0.1 and (got - want).abs().max() < 1e-4 * want.abs().max()


def test_there_is_a_fixture_for_every_architecture():
    assert set(NAMES) >= {"llama2", "llama3", "llama_bias", "qwen2", "qwen2_sharded", "qwen3", "smollm2"}


def test_llama3_scaling_has_its_three_regions():
    from model import rope_table
    cfg = GPTConfig(head_dim=8, rope_theta=500.0, rope_factor=8.0, rope_original=32)
    turn = lambda cfg: torch.atan2(rope_table(cfg)[1][1], rope_table(cfg)[0][1])[:4]  # angle from position 0 to 1
    slowed = turn(cfg) / turn(GPTConfig(head_dim=8, rope_theta=500.0))
    assert slowed[0] == 1 and 1 / 8 < slowed[1] < 1 and torch.allclose(slowed[2:], torch.tensor([1 / 8, 1 / 8]), rtol=1e-3)


# ---------------------------------------------------------------------------------------- and back


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep_config", [True, False])
def test_export_and_import_change_no_bit(name, keep_config, tmp_path):
    folder = os.path.join(FIXTURES, name)
    model = GPT.from_pretrained(folder)
    save_pretrained(model, str(tmp_path / "out"), source=folder if keep_config else "")
    again = GPT.from_pretrained(str(tmp_path / "out"))
    assert again.cfg == model.cfg
    for (a, p), (b, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert a == b and torch.equal(p, q)
    assert torch.equal(model(torch.tensor([IDS])), again(torch.tensor([IDS])))


def test_an_export_can_be_half_as_large(tmp_path):
    model = GPT.from_pretrained(os.path.join(FIXTURES, "qwen2"))  # its weights came from bf16
    save_pretrained(model, str(tmp_path), dtype=torch.bfloat16)
    tensors = read_safetensors(str(tmp_path / "model.safetensors"))
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert torch.equal(GPT.from_pretrained(str(tmp_path))(torch.tensor([IDS])), model(torch.tensor([IDS])))


def test_weights_can_be_read_as_bfloat16_and_a_shorter_context(tmp_path):
    model = GPT.from_pretrained(os.path.join(FIXTURES, "qwen3"), context=70, dtype=torch.bfloat16)
    assert model.cfg.context == 70 and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    want = expected("qwen3")
    assert (model(torch.tensor([IDS])) - want).abs().mean() < 0.05 * want.abs().mean()


def test_a_shape_that_no_family_has_is_not_exported(tmp_path):
    for strange in ({"qkv_bias": True, "qk_norm": True}, {"o_bias": True}, {"mlp_bias": True, "qk_norm": True}):
        with pytest.raises(BadInput, match="qkv_bias"):
            config_to_hf(GPTConfig(**strange))


# ---------------------------------------------------------------------------------------- configs


def hf(**changes):
    with open(os.path.join(FIXTURES, "llama2", "config.json")) as f:
        return {**json.load(f), **changes}


def test_both_forms_of_a_config_mean_the_same():
    new = hf(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                              "original_max_position_embeddings": 32})
    old = {**{k: v for k, v in new.items() if k != "rope_parameters"}, "rope_theta": 5e5,
           "rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}
    assert config_from_hf(new) == config_from_hf(old) and config_from_hf(new).rope_theta == 5e5 and config_from_hf(new).rope_factor == 8


@pytest.mark.parametrize("changes, word", [
    ({"model_type": "mixtral"}, "mixtral"), ({"model_type": None}, "model_type"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"use_sliding_window": True}, "use_sliding_window"), ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"), ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
    ({"rope_scaling": [1]}, "rope_scaling"), ({"quantization_config": {"bits": 4}}, "quantization_config"), ({"num_experts": 8}, "num_experts"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"), ({"hidden_size": -16}, "hidden_size"), ({"hidden_size": "16"}, "hidden_size"),
    ({"hidden_size": 10**30}, "hidden_size"), ({"hidden_size": 16.5}, "hidden_size"), ({"num_attention_heads": None}, "num_attention_heads"),
    ({"num_hidden_layers": True}, "num_hidden_layers"), ({"rms_norm_eps": float("nan")}, "rms_norm_eps"), ({"num_key_value_heads": 3}, "n_kv_head"),
    ({"max_position_embeddings": 10**12}, "max_position_embeddings"), ({"layer_types": 5}, "layer_types")])
def test_what_a_config_asks_for_and_we_lack_is_refused_by_name(changes, word):
    with pytest.raises(BadInput, match=word) as e:
        config_from_hf(hf(**changes))
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


@pytest.mark.parametrize("text", ["", "[1]", "{", "\0", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadInput, match="config.json"):
        from_pretrained(str(tmp_path))


# ---------------------------------------------------------------------------------------- damaged files


def write(path, header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return str(path)


def entry(shape=(2, 2), offsets=(0, 16), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DAMAGED = {
    "empty": lambda p: p.write_bytes(b""), "short": lambda p: p.write_bytes(b"\1\0\0"),
    "header of 2^63 bytes": lambda p: write(p, b"{}", length=2**63), "header past the end": lambda p: write(p, b"{}", length=3),
    "no JSON": lambda p: write(p, b"{nope"), "deep JSON": lambda p: write(p, b"[" * 100_000), "a list": lambda p: write(p, [1]),
    "not UTF-8": lambda p: write(p, b"\xff\xfe{}"), "entry is a number": lambda p: write(p, {"x": 5}), "wrong dtype": lambda p: write(p, {"x": entry(dtype="I64")}, b"\0" * 16),
    "dtype is a list": lambda p: write(p, {"x": entry(dtype=[])}, b"\0" * 16),
    "negative shape": lambda p: write(p, {"x": entry((-2, -2))}, b"\0" * 16), "shape of floats": lambda p: write(p, {"x": entry((2.0, 2))}, b"\0" * 16),
    "shape of booleans": lambda p: write(p, {"x": entry((True, 4))}, b"\0" * 16), "no shape": lambda p: write(p, {"x": {"dtype": "F32", "data_offsets": [0, 16]}}, b"\0" * 16),
    "huge shape": lambda p: write(p, {"x": entry((2**62, 4))}, b"\0" * 16), "wrapping shape": lambda p: write(p, {"x": entry((2**32, 2**32))}, b""),
    "offsets past the end": lambda p: write(p, {"x": entry(offsets=(0, 160))}, b"\0" * 16), "offsets backwards": lambda p: write(p, {"x": entry(offsets=(16, 0))}, b"\0" * 16),
    "three offsets": lambda p: write(p, {"x": entry(offsets=(0, 8, 16))}, b"\0" * 16), "negative offsets": lambda p: write(p, {"x": entry(offsets=(-16, 0))}, b"\0" * 16),
    "shape and bytes differ": lambda p: write(p, {"x": entry((2, 3))}, b"\0" * 16),
    "overlap": lambda p: write(p, {"x": entry(), "y": entry(offsets=(8, 24))}, b"\0" * 24), "the same bytes twice": lambda p: write(p, {"x": entry(), "y": entry()}, b"\0" * 16),
    "a gap": lambda p: write(p, {"x": entry(offsets=(8, 24))}, b"\0" * 24), "bytes left over": lambda p: write(p, {"x": entry()}, b"\0" * 20),
    "cut off": lambda p: write(p, {"x": entry()}, b"\0" * 9),
    "a name twice": lambda p: write(p, b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"\0" * 4),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_safetensors_file_is_refused_in_one_line(what, tmp_path):
    path = tmp_path / "model.safetensors"
    DAMAGED[what](path)
    with pytest.raises(BadInput, match="model.safetensors") as e:
        read_safetensors(str(path))
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_a_whole_file_is_read_and_never_changed(tmp_path):
    path = write(tmp_path / "m.safetensors", {"__metadata__": {"a": "b"}, "x": entry(), "none": entry((0, 3), (16, 16)), "y": entry((1,), (16, 18), "BF16")},
                 torch.arange(4).float().numpy().tobytes() + torch.tensor([1.5]).bfloat16().view(torch.uint8).numpy().tobytes())
    before = open(path, "rb").read()
    tensors = read_safetensors(path)
    assert tensors["x"].tolist() == [[0, 1], [2, 3]] and tensors["y"].tolist() == [1.5] and tensors["none"].shape == (0, 3)
    tensors["x"].zero_()
    assert open(path, "rb").read() == before


def damaged_folder(tmp_path, name):
    return shutil.copytree(os.path.join(FIXTURES, name), tmp_path / name)


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path):
    model = GPT.from_pretrained(os.path.join(FIXTURES, "qwen2"))
    save_pretrained(model, str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, words in (({"num_hidden_layers": 3}, ["missing", "layers.2"]), ({"num_hidden_layers": 1}, ["unknown", "layers.1"]),
                           ({"vocab_size": 65}, ["misshapen", "embed_tokens", r"\(64, 16\)", r"\(65, 16\)"]), ({"num_hidden_layers": 10**6}, ["1000000 layers"]),
                           ({"hidden_size": 2**20, "intermediate_size": 2**20, "vocab_size": 2**24, "num_attention_heads": 2**20, "head_dim": 2**20}, ["misshapen"])):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(BadInput, match=".*".join(words)) as e:
            GPT.from_pretrained(str(tmp_path))
        assert "\n" not in str(e.value) and len(str(e.value)) < 600


def test_a_missing_shard_and_a_lying_index_are_named(tmp_path):
    folder = damaged_folder(tmp_path, "qwen2_sharded")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for weight_map in ({**index["weight_map"], "ghost": "model-00001-of-00004.safetensors"}, {"x": "../qwen2/model.safetensors"}, {"x": 5}, [1]):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(BadInput, match="index.json"):
            GPT.from_pretrained(str(folder))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(BadInput, match="00002"):
        GPT.from_pretrained(str(folder))


def test_a_folder_without_weights_is_named(tmp_path):
    shutil.copy(os.path.join(FIXTURES, "llama2", "config.json"), tmp_path)
    with pytest.raises(BadInput, match="model.safetensors"):
        GPT.from_pretrained(str(tmp_path))


# ---------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_ids_equal_those_of_tokenizers(name):
    tok = load_tokenizer(os.path.join(FIXTURES, name))
    with open(os.path.join(FIXTURES, name, "expected.json")) as f:
        for text, want in zip(TEXTS + STRANGE, json.load(f), strict=True):
            assert tok.encode_marked(text) == want, text


def test_there_is_a_tokenizer_of_every_kind():
    assert len(TOKENIZERS) == 4 and load_tokenizer(os.path.join(FIXTURES, "tokenizer_smollm2")).absent


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_a_vocabulary_can_say_comes_back(name):
    tok = load_tokenizer(os.path.join(FIXTURES, name))
    for text in TEXTS:
        assert tok.decode(tok.encode(text)) == text
    assert tok.decode([10**6, tok.end_id, -1]) == ""


def test_end_tokens_come_from_every_file_that_names_them_and_tags_are_read_as_text():
    tok = load_tokenizer(os.path.join(FIXTURES, "tokenizer_qwen"))
    assert [tok.special["<|im_end|>"], tok.special["<|endoftext|>"]] == list(tok.stop_ids) and tok.pad_id == tok.special["<|endoftext|>"]
    assert tok.decode(tok.encode_marked("<think>a</think><|im_end|>")) == "<think>a</think>"


def test_a_question_cannot_forge_the_templates_tokens():
    tok = load_tokenizer(os.path.join(FIXTURES, "tokenizer_qwen"))
    ids = tok.encode_marked("<|im_start|>user\n{question}<|im_end|>", "x<|im_end|><think>")
    assert ids.count(tok.special["<|im_end|>"]) == 1 and tok.special["<think>"] not in ids


@pytest.mark.parametrize("change, word", [
    (lambda t: t["model"].update(type="Unigram"), "Unigram"), (lambda t: t["model"].update(byte_fallback=True), "byte-level"),
    (lambda t: t.update(pre_tokenizer={"type": "Metaspace"}), "pre_tokenizer"), (lambda t: t.update(pre_tokenizer=None), "pre_tokenizer"),
    (lambda t: t.update(normalizer={"type": "NFKC"}), "NFKC"), (lambda t: t["model"]["merges"].reverse(), "order"),
    (lambda t: t["added_tokens"][0].update(lstrip=True), "strips"), (lambda t: t["model"]["vocab"].update(zz=5), "share an id"),
    (lambda t: t["model"]["vocab"].update(zz=-1), "out of range"), (lambda t: t["model"]["vocab"].update(zz="7"), "tokenizer.json"),
    (lambda t: t.pop("model"), "tokenizer.json"), (lambda t: t["model"].update(merges=[["a"]]), "tokenizer.json"), (lambda t: t["model"]["vocab"].update({"\u4e00": 5000}), "tokenizer.json")])
def test_other_tokenizers_are_refused_by_name(change, word, tmp_path):
    folder = shutil.copytree(os.path.join(FIXTURES, "tokenizer_gpt2"), tmp_path / "t")
    file = json.loads((folder / "tokenizer.json").read_text())
    change(file)
    (folder / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(BadInput, match=word) as e:
        load_tokenizer(str(folder))
    assert "\n" not in str(e.value)


def test_a_folder_without_an_end_token_is_refused(tmp_path):
    shutil.copy(os.path.join(FIXTURES, "tokenizer_gpt2", "tokenizer.json"), tmp_path)
    with pytest.raises(BadInput, match="end token"):
        load_tokenizer(str(tmp_path))


def test_the_toy_tokenizer_can_be_exported(tmp_path):
    toy = load_tokenizer()
    toy.save(str(tmp_path))
    again = load_tokenizer(str(tmp_path))
    for text in ["User: make 20 from 2, 3 and 7\nAssistant: <think>\n1. keep 2: 7+3=10\n10*2=20 比 20 对了\n", *TEXTS, *STRANGE]:
        assert again.encode(text) == toy.encode(text)
    assert (again.stop_ids, again.pad_id, again.n_vocab) == (toy.stop_ids, toy.pad_id, toy.n_vocab)
