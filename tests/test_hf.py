"""Hugging Face folders: the logits of transformers, exact exports, damaged files refused in one
line. tests/fixtures/make.py imports IDS, TEXTS and STRANGE from here."""
import itertools
import json
import os
import random
import shutil

import pytest
import torch

import data
from data import (
    DataConfig,
    countdown_problem,
    load_tokenizer,
    prompt_ids,
    sft_batch,
)
from model import (
    GPTConfig,
    UserError,
    config_from_hf,
    config_to_hf,
    from_pretrained,
    read_safetensors,
    rope_table,
    save_pretrained,
)

TEXTS = [  # the small tokenizers are trained on these
    "Use each of the numbers 3, 7 and 2 exactly once to make 20. What's (3 + 7) * 2?",
    "It's 100% right: 1,234.50 - 3/4 = 1233.75, isn't it?",
    "def f(x):\n    return x ** 2\n\n\nprint(f(12))  # 144",
    "<think>\nfirst 7 - 3 = 4, no\n</think>\n<answer>20</answer>",
    "naïve café, Straße, señor",
    "先想一想，再回答。答案是 20。",
    "Сначала подумай, потом ответь.",
    "   leading and trailing   \t tabs \n",
    "he'll we've I'D they're",
    "😀 👍🏽 ½ ² Ⅷ ٣",
]
STRANGE = [  # ... and must agree on these all the same
    "", " ", "\n", "  \n\n \r\n", "\t\t x", "a  b   c    12     3", "1234567890", " 1 2  3   4",
    "don't DON'T 's 'S !'s", "e\u0301 \u00e9 \u1100\u1161 \u2126", "\x00\x04\x1d\x7f",
    "!\x04! a\x04b 1\x041", "a's\x04 \x04  \x04\n\n\x04", "\U000f8e4e\U0009a546 \U00042345x",
    "\ufeffBOM \u200b \u00a0 \u2003 \u3000.", "<|im_start|>user\nhi<|im_end|>\n",
    "<think></think><|im_end", "<<|im_end|>>", "x<|endoftext|><|endoftext|>y",
    "ｆｕｌｌ ｗｉｄｔｈ １２",
    "שלום مرحبا हिन्दी ไทย", "👨‍👩‍👧‍👦",
    "_under_score__ CamelCase", "\\frac{1}{2} \\boxed{72} $18",
    "..." * 20, " " * 50 + "7", "a" * 300, "\n" * 30 + "x",
]
IDS = [3, 17, 60, 5, 5, 9, 33, 1, 0, 63] * 6  # past the original context of the llama3 fixture

FIXTURES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fixtures")


def fixture(*names):
    return os.path.join(FIXTURES, *names)


FOLDERS = sorted(os.listdir(FIXTURES))
NAMES = [name for name in FOLDERS if os.path.exists(fixture(name, "config.json"))]
TOKENIZERS = [name for name in FOLDERS if name.startswith("tokenizer_")]


def expected(name):
    return read_safetensors(fixture(name, "expected.safetensors"))["logits"]


def logits(model):
    return model(torch.tensor([IDS]))


# ----------------------------------------------------------------------------------- the same model


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers(name):
    got, want = logits(from_pretrained(fixture(name))), expected(name)
    assert want.std() > 0.1 and (got - want).abs().max() < 1e-4 * want.abs().max()


def test_there_is_a_fixture_for_every_architecture():
    assert set(NAMES) >= {"llama2", "llama3", "llama_bias", "smollm2"}
    assert set(NAMES) >= {"qwen2", "qwen2_sharded", "qwen3"}


def test_llama3_scaling_has_its_three_regions():
    def turn(**scaling):  # the four pairs' angles from position 0 to 1
        cos, sin = rope_table(GPTConfig(head_dim=8, rope_theta=500.0, **scaling))
        return torch.atan2(sin[1], cos[1])[:4]

    slowed = turn(rope_factor=8.0, rope_original=32) / turn()
    assert slowed[0] == 1 and 1 / 8 < slowed[1] < 1
    assert slowed[2:].tolist() == pytest.approx([1 / 8, 1 / 8], rel=1e-3)


# ----------------------------------------------------------------------------------------- and back


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep_config", [True, False])
def test_export_and_import_change_no_bit(name, keep_config, tmp_path):
    folder = fixture(name)
    model = from_pretrained(folder)
    save_pretrained(model, str(tmp_path / "out"), source=folder if keep_config else "")
    again = from_pretrained(str(tmp_path / "out"))
    assert again.cfg == model.cfg
    weights = dict(again.named_parameters())
    assert list(weights) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), logits(again))


def test_an_export_can_be_half_as_large(tmp_path):
    model = from_pretrained(fixture("qwen2"))  # its weights came from bf16
    save_pretrained(model, str(tmp_path), dtype=torch.bfloat16)
    tensors = read_safetensors(str(tmp_path / "model.safetensors"))
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert torch.equal(logits(from_pretrained(str(tmp_path))), logits(model))


def test_weights_can_be_read_as_bfloat16_and_a_shorter_context(tmp_path):
    model = from_pretrained(fixture("qwen3"), context=70, dtype=torch.bfloat16)
    assert model.cfg.context == 70 and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    want = expected("qwen3")
    assert (logits(model) - want).abs().mean() < 0.05 * want.abs().mean()


def test_a_shape_that_no_family_has_is_not_exported(tmp_path):
    shapes = itertools.product([False, True], repeat=4)
    exported = {}
    for qk_norm, qkv_bias, o_bias, mlp_bias in shapes:
        cfg = GPTConfig(qk_norm=qk_norm, qkv_bias=qkv_bias, o_bias=o_bias, mlp_bias=mlp_bias)
        try:
            hf = config_to_hf(cfg)
        except UserError as e:
            assert "qkv_bias" in str(e) and "\n" not in str(e)
        else:
            assert config_from_hf(hf) == cfg
            exported[qk_norm, qkv_bias, o_bias, mlp_bias] = hf["model_type"]
    assert exported == {
        (0, 0, 0, 0): "llama", (0, 0, 0, 1): "llama", (0, 1, 1, 0): "llama", (0, 1, 1, 1): "llama",
        (0, 1, 0, 0): "qwen2", (1, 0, 0, 0): "qwen3", (1, 1, 1, 0): "qwen3"}


# ------------------------------------------------------------------------------------------ configs


def hf(**changes):
    with open(fixture("llama2", "config.json"), encoding="utf-8") as f:
        return {**json.load(f), **changes}


def test_both_forms_of_a_config_mean_the_same():
    rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}
    new = hf(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **rope})
    old = hf(rope_scaling={"type": "llama3", **rope}, rope_theta=5e5)
    del old["rope_parameters"]
    cfg = config_from_hf(new)
    assert cfg == config_from_hf(old) and cfg.rope_theta == 5e5 and cfg.rope_factor == 8


LACKING = [  # changes of a config, and a word that the refusal must name
    ({"model_type": "mixtral"}, "mixtral"),
    ({"model_type": None}, "model_type"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
    ({"layer_types": 5}, "layer_types"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
    ({"rope_scaling": [1]}, "rope_scaling"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"num_experts": 8}, "num_experts"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"hidden_size": -16}, "hidden_size"),
    ({"hidden_size": "16"}, "hidden_size"),
    ({"hidden_size": 10**30}, "hidden_size"),
    ({"hidden_size": 16.5}, "hidden_size"),
    ({"hidden_size": float("nan")}, "hidden_size"),
    ({"hidden_size": 0}, "n_embd"),
    ({"hidden_size": 2**20}, "hidden_size"),
    ({"num_attention_heads": 0}, "n_head"),
    ({"num_attention_heads": None}, "num_attention_heads"),
    ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"num_key_value_heads": 3}, "n_kv_head"),
    ({"max_position_embeddings": 10**12}, "max_position_embeddings"),
]


@pytest.mark.parametrize("changes, word", LACKING)
def test_what_a_config_asks_for_and_we_lack_is_refused_by_name(changes, word):
    with pytest.raises(UserError, match=word) as e:
        config_from_hf(hf(**changes))
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


@pytest.mark.parametrize("text", ["", "[1]", "{", "\0", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        from_pretrained(str(tmp_path))


# ------------------------------------------------------------------------------------ damaged files


def write(path, header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + body)
    return str(path)


def entry(shape=(2, 2), offsets=(0, 16), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


TWICE = b'"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
DAMAGED = {  # header, bytes after it, length that is given for the header if not its own
    "header of 2^63 bytes": (b"{}", 0, 2**63),
    "header past the end": (b"{}", 0, 3),
    "no JSON": (b"{nope", 0),
    "deep JSON": (b"[" * 100_000, 0),
    "a list": ([1], 0),
    "not UTF-8": (b"\xff\xfe{}", 0),
    "entry is a number": ({"x": 5}, 0),
    "wrong dtype": ({"x": entry(dtype="I64")}, 16),
    "dtype is a list": ({"x": entry(dtype=[])}, 16),
    "negative shape": ({"x": entry((-2, -2))}, 16),
    "shape of floats": ({"x": entry((2.0, 2))}, 16),
    "shape of booleans": ({"x": entry((True, 4))}, 16),
    "no shape": ({"x": {"dtype": "F32", "data_offsets": [0, 16]}}, 16),
    "huge shape": ({"x": entry((2**62, 4))}, 16),
    "wrapping shape": ({"x": entry((2**32, 2**32))}, 0),
    "offsets past the end": ({"x": entry(offsets=(0, 160))}, 16),
    "offsets past the end that fit the shape": ({"x": entry((40,), (0, 160))}, 16),
    "offsets backwards": ({"x": entry(offsets=(16, 0))}, 16),
    "three offsets": ({"x": entry(offsets=(0, 8, 16))}, 16),
    "offsets of floats": ({"x": entry(offsets=(0.0, 16.0))}, 16),
    "negative offsets": ({"x": entry(offsets=(-16, 0))}, 16),
    "shape and bytes differ": ({"x": entry((2, 3))}, 16),
    "overlap": ({"x": entry(), "y": entry(offsets=(8, 24))}, 24),
    "the same bytes twice": ({"x": entry(), "y": entry()}, 16),
    "a gap": ({"x": entry(offsets=(8, 24))}, 24),
    "bytes left over": ({"x": entry()}, 20),
    "cut off": ({"x": entry()}, 9),
    "a name twice": (b"{" + TWICE + b", " + TWICE + b"}", 4),
}


@pytest.mark.parametrize("content", [b"", b"\1\0\0", b"\0" * 8])
def test_a_file_too_short_for_a_header_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors") as e:
        read_safetensors(str(path))
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_safetensors_file_is_refused_in_one_line(what, tmp_path):
    header, n_bytes, *length = DAMAGED[what]
    path = write(tmp_path / "model.safetensors", header, b"\0" * n_bytes, *length)
    with pytest.raises(UserError, match="model.safetensors") as e:
        read_safetensors(path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_a_whole_file_is_read_and_never_changed(tmp_path):
    header = {"__metadata__": {"a": "b"}, "x": entry(), "none": entry((0, 3), (16, 16)),
              "y": entry((1,), (16, 18), "BF16")}
    x, y = torch.arange(4).float(), torch.tensor([1.5]).bfloat16()
    body = x.numpy().tobytes() + y.view(torch.uint8).numpy().tobytes()
    path = tmp_path / "m.safetensors"
    write(path, header, body)
    before = path.read_bytes()
    tensors = read_safetensors(str(path))
    assert tensors["x"].tolist() == [[0, 1], [2, 3]] and tensors["y"].tolist() == [1.5]
    assert tensors["none"].shape == (0, 3)
    tensors["x"].zero_()
    assert path.read_bytes() == before


def test_the_order_of_names_in_a_header_need_not_be_that_of_the_bytes(tmp_path):
    header = {"b": entry((1,), (4, 8)), "a": entry((1,), (0, 4))}
    path = write(tmp_path / "m.safetensors", header, torch.tensor([1.0, 2.0]).numpy().tobytes())
    tensors = read_safetensors(path)
    assert tensors["a"].tolist() == [1] and tensors["b"].tolist() == [2]


def damaged_folder(tmp_path, name):
    return shutil.copytree(fixture(name), tmp_path / name)


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path):
    model = from_pretrained(fixture("qwen2"))
    save_pretrained(model, str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    most = 2**20 - 2  # no memory is taken for what a config says before the weights were compared
    huge = {"hidden_size": most, "intermediate_size": most, "vocab_size": 10**12 - 1,
            "num_attention_heads": most, "head_dim": most}
    cases = [({"num_hidden_layers": 3}, "missing.*layers.2"),
             ({"num_hidden_layers": 1}, "unknown.*layers.1"),
             ({"num_hidden_layers": 10**6}, "1000000 layers"),
             ({"vocab_size": 65}, r"misshapen.*embed_tokens.*\(64, 16\).*\(65, 16\)"),
             (huge, "misshapen")]
    for changes, words in cases:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError, match=words) as e:
            from_pretrained(str(tmp_path))
        assert "\n" not in str(e.value) and len(str(e.value)) < 600


def test_a_missing_shard_and_a_lying_index_are_named(tmp_path):
    folder = damaged_folder(tmp_path, "qwen2_sharded")
    path = folder / "model.safetensors.index.json"
    index = path.read_text()
    weight_map = json.loads(index)["weight_map"]
    lies = [{**weight_map, "ghost": "model-00001-of-00004.safetensors"},
            {"x": "../qwen2/model.safetensors"}, {"x": 5}, [1], None]
    for lie in lies:
        path.write_text(json.dumps({"weight_map": lie}))
        with pytest.raises(UserError, match="index.json"):
            from_pretrained(str(folder))
    path.write_text(index)
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(UserError, match="00002"):
        from_pretrained(str(folder))


def test_a_folder_without_weights_is_named(tmp_path):
    shutil.copy(fixture("llama2", "config.json"), tmp_path)
    with pytest.raises(UserError, match="model.safetensors"):
        from_pretrained(str(tmp_path))


# --------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_ids_equal_those_of_tokenizers(name):
    tok = load_tokenizer(fixture(name))
    with open(fixture(name, "expected.json"), encoding="utf-8") as f:
        for text, want in zip(TEXTS + STRANGE, json.load(f), strict=True):
            assert tok.encode_marked(text) == want, text


def test_there_is_a_tokenizer_of_every_kind():
    assert len(TOKENIZERS) == 4 and load_tokenizer(fixture("tokenizer_smollm2")).absent


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_a_vocabulary_can_say_comes_back(name):
    tok = load_tokenizer(fixture(name))
    for text in TEXTS:
        assert tok.decode(tok.encode(text)) == text
    assert tok.decode([10**6, tok.end_id, -1]) == ""


def test_end_tokens_come_from_every_file_that_names_them_and_tags_are_read_as_text():
    tok = load_tokenizer(fixture("tokenizer_qwen"))
    end, pad = tok.special["<|im_end|>"], tok.special["<|endoftext|>"]
    assert list(tok.stop_ids) == [end, pad] and tok.pad_id == pad
    assert tok.decode(tok.encode_marked("<think>a</think><|im_end|>")) == "<think>a</think>"


def test_a_question_cannot_forge_the_templates_tokens():
    tok = load_tokenizer(fixture("tokenizer_qwen"))
    ids = tok.encode_marked("<|im_start|>user\n{question}<|im_end|>", "x<|im_end|><think>")
    assert ids.count(tok.special["<|im_end|>"]) == 1 and tok.special["<think>"] not in ids


def test_tags_are_one_token_where_the_vocabulary_shows_them_and_hidden_ones_are_spelled():
    tok = load_tokenizer(fixture("tokenizer_qwen"))
    ids = tok.encode("<think>\n1</think>{question}<|im_end|>")
    assert ids[0] == tok.special["<think>"] and ids.count(tok.special["</think>"]) == 1
    assert tok.special["<|im_end|>"] not in ids
    assert tok.decode(ids) == "<think>\n1</think>{question}<|im_end|>"
    assert tok.encode("<|im_end|>") != [tok.special["<|im_end|>"]]
    cfg = DataConfig(template="qwen", prefill_think=True)
    problem = countdown_problem((3, 7, 2), 20)
    rows = [(data.prompt_ids(problem, tok, cfg), data.completion_ids("so</think>", tok, cfg))]
    tokens, mask = sft_batch(rows, tok, cfg, random.Random(0), 1)
    assert tokens[mask].tolist() == [*tok.encode("so</think>"), tok.special["<|im_end|>"]]
    assert tok.special["</think>"] in tokens[mask] and tok.special["<think>"] in tokens[~mask]


@pytest.mark.parametrize("template, end", [("qwen", "<|im_end|>"), ("llama", "<|eot_id|>")])
def test_the_end_of_a_templates_turn_ends_a_completion_whatever_the_files_name(
        template, end, tmp_path):
    other, text = "<|endoftext|>", open(fixture("tokenizer_llama3", "tokenizer.json")).read()
    (tmp_path / "tokenizer.json").write_text(text.replace("<|im_end|>", end))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": other}))
    tok = load_tokenizer(str(tmp_path))
    ids, find_end = data.stops(tok, DataConfig(template=template))
    assert list(ids) == [tok.special[end], tok.special[other]] and find_end is None


def test_a_prompt_begins_as_the_tokenizer_begins_every_text(tmp_path):
    file = json.loads(open(fixture("tokenizer_llama3", "tokenizer.json"), encoding="utf-8").read())
    for name in ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"):
        id = max(token["id"] for token in file["added_tokens"]) + 1
        file["added_tokens"].append({"id": id, "content": name, "special": True})
    whole = {"Sequence": {"id": "A", "type_id": 0}}
    first = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    file["post_processor"] = {"type": "Sequence", "processors": [
        {"type": "ByteLevel"}, {"type": "TemplateProcessing", "single": [first, whole]}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|eot_id|>"}')
    tok, problem = load_tokenizer(str(tmp_path)), countdown_problem((3, 7, 2), 20)
    begin = tok.special["<|begin_of_text|>"]
    for template in ("base", "llama"):
        ids, cfg = prompt_ids(problem, tok, DataConfig(template=template)), DataConfig()
        assert ids[0] == begin and ids.count(begin) == 1
        cfg.template, export = template, tmp_path / template
        export.mkdir()
        data.add_chat_template(export, cfg, tok)
        begins = (export / "chat_template.jinja").read_text("utf-8")[:17]
        assert begins == ("<|begin_of_text|>" if template == "llama" else "{{ bos_token }}A ")
    assert load_tokenizer(fixture("tokenizer_qwen")).first == []


def test_without_a_chat_template_a_completion_ends_with_its_first_answer():
    tok = load_tokenizer(fixture("tokenizer_qwen"))
    ids, find_end = data.stops(tok, DataConfig(template="base"))
    said = tok.encode("<think>2</think>\n<answer>9</answer>")
    more = tok.encode("\n\nUser: <answer>1</answer>")
    assert find_end(said + more) == find_end(said) == len(said) and ids == tok.stop_ids
    assert find_end(said[:-1]) == find_end([]) == find_end([10**6]) == 0


@pytest.mark.parametrize("template, lacks", [("llama", "eot_id"), ("qwen", "im_start")])
def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused(template, lacks):
    tok, problem = load_tokenizer(), countdown_problem((3, 7, 2), 20)
    with pytest.raises(UserError, match=lacks):
        prompt_ids(problem, tok, DataConfig(template=template))


def test_several_merges_may_have_one_product(tmp_path):
    folder = shutil.copytree(fixture("tokenizer_gpt2"), tmp_path / "t")
    file = json.loads((folder / "tokenizer.json").read_text())
    vocab, merges = file["model"]["vocab"], []
    for pair in file["model"]["merges"]:  # as in Llama 3: each product with all its pairs
        word = "".join(pair)
        merges += [[word[:i], word[i:]] for i in range(1, len(word))
                   if word[:i] in vocab and word[i:] in vocab]
    assert len(merges) > len(file["model"]["merges"])
    file["model"]["merges"] = merges
    (folder / "tokenizer.json").write_text(json.dumps(file))
    tok, same = load_tokenizer(str(folder)), load_tokenizer(fixture("tokenizer_gpt2"))
    assert all(tok.encode(text) == same.encode(text) for text in TEXTS + STRANGE)


def test_a_name_on_the_hub_is_no_folder():
    with pytest.raises(UserError, match="local folder.*hf download Qwen/Qwen3-0.6B --local"):
        load_tokenizer("Qwen/Qwen3-0.6B")


REVERSED, REMOVED = "reversed", "removed"
FOREIGN = [  # what of a tokenizer.json is changed, to what, and a word of the refusal
    (("model", "type"), "Unigram", "Unigram"),
    (("model", "byte_fallback"), True, "byte-level"),
    (("model", "merges"), [["a"]], "tokenizer.json"),
    (("model", "merges"), REVERSED, "order"),
    (("model", "merges", 0), REMOVED, "no merge"),
    (("model", "vocab", "zz"), 5, "share an id"),
    (("model", "vocab", "zz"), -1, "out of range"),
    (("model", "vocab", "zz"), "7", "tokenizer.json"),
    (("model", "vocab", "\u4e00"), 5000, "tokenizer.json"),
    (("model",), REMOVED, "tokenizer.json"),
    (("pre_tokenizer",), {"type": "Metaspace"}, "pre_tokenizer"),
    (("pre_tokenizer",), None, "pre_tokenizer"),
    (("pre_tokenizer",), {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": True},
        {"type": "ByteLevel", "use_regex": False}]}, "pre_tokenizer"),
    (("normalizer",), {"type": "NFKC"}, "NFKC"),
    (("added_tokens", 0, "lstrip"), True, "strips"),
]


@pytest.mark.parametrize("where, value, word", FOREIGN)
def test_other_tokenizers_are_refused_by_name(where, value, word, tmp_path):
    folder = shutil.copytree(fixture("tokenizer_gpt2"), tmp_path / "t")
    file = json.loads((folder / "tokenizer.json").read_text())
    part, (*path, last) = file, where
    for key in path:
        part = part[key]
    if value == REMOVED:
        del part[last]
    else:
        part[last] = part[last][::-1] if value == REVERSED else value
    (folder / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(UserError, match=word) as e:
        load_tokenizer(str(folder))
    assert "\n" not in str(e.value)


def test_a_folder_without_an_end_token_is_refused(tmp_path):
    shutil.copy(fixture("tokenizer_gpt2", "tokenizer.json"), tmp_path)
    with pytest.raises(UserError, match="names no end token"):
        load_tokenizer(str(tmp_path))


def test_the_toy_tokenizer_can_be_exported(tmp_path):
    toy = load_tokenizer()
    toy.save(str(tmp_path))
    again = load_tokenizer(str(tmp_path))
    question, steps = "User: make 20 from 2, 3 and 7", "1. keep 2: 7+3=10\n10*2=20 比 20 对了\n"
    for text in [f"{question}\nAssistant: <think>\n{steps}", *TEXTS, *STRANGE]:
        assert again.encode(text) == toy.encode(text)
    assert again.stop_ids == toy.stop_ids and again.pad_id == toy.pad_id
    assert again.n_vocab == toy.n_vocab
