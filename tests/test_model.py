"""Residual capture on tiny random models of every supported family, and loading."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qscope import model as qm
from qscope import packages
from qscope.errors import InputError, ModelError
from qscope.files import file_sha256

VOCAB, WIDTH, BLOCKS = 61, 32, 4

SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=BLOCKS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.1,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
LINEAR = dict(
    linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
    layer_types=["linear_attention", "full_attention"] * 2,
)  # fmt: skip
VISION = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, image_size=16, patch_size=8)
VISION_35 = dict(depth=BLOCKS, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=WIDTH)
GPT2 = dict(vocab_size=VOCAB, n_embd=WIDTH, n_layer=BLOCKS, n_head=4, n_positions=64, initializer_range=0.1)

# family: (class, config class, options, final norm, the list that must be chosen)
FAMILIES = {
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SMALL, "model.norm", "model.layers"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", SMALL | EXPERTS, "model.norm", "model.layers"),
    "qwen3_5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", SMALL | LINEAR, "model.norm", "model.layers"),
    "qwen3_5_moe": (
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeTextConfig",
        SMALL | LINEAR | EXPERTS | dict(shared_expert_intermediate_size=24),
        "model.norm",
        "model.layers",
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL, "model.norm", "model.layers"),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", SMALL, "model.norm", "model.layers"),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", SMALL, "model.norm", "model.layers"),
    "gemma3_vision": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        # As many blocks in the vision tower as in the trunk: the count alone cannot tell them apart.
        dict(text_config=SMALL, vision_config=VISION | dict(num_hidden_layers=BLOCKS), mm_tokens_per_image=4),
        "model.language_model.norm",
        "model.language_model.layers",
    ),
    "qwen3_5_vision": (
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        dict(text_config=SMALL | LINEAR, vision_config=VISION_35),
        "model.language_model.norm",
        "model.language_model.layers",
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")},
        "gpt_neox.final_layer_norm",
        "gpt_neox.layers",
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, "transformer.ln_f", "transformer.h"),
}


def build(family: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    kind, config, options, _, _ = FAMILIES[family]
    return getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param, build(request.param)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def token_ids(rows=2, length=11, seed=1):
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def hook_count(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_capture_equals_hidden_states(family):
    name, model = family
    norm = model.get_submodule(FAMILIES[name][3])
    ids = token_ids()
    with torch.no_grad():
        plain = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    before = hook_count(model)  # transformers leaves its own recording hooks in place
    with qm.capture(model, range(BLOCKS)) as residual:
        logits = model(input_ids=ids, use_cache=False).logits
    assert hook_count(model) == before
    assert torch.equal(logits, plain.logits)  # looking changes nothing
    assert list(residual) == list(range(BLOCKS))
    for layer in range(BLOCKS - 1):
        assert torch.equal(residual[layer], plain.hidden_states[layer + 1]), layer
    with torch.no_grad():
        assert torch.equal(norm(residual[BLOCKS - 1]), plain.hidden_states[-1])
    # The last entry of hidden_states is after the final norm: taking it for the residual would be wrong.
    assert not torch.allclose(residual[BLOCKS - 1], plain.hidden_states[-1], atol=1e-3)


def test_blocks_width_and_count(family):
    name, model = family
    assert qm.decoder_layers(model) is model.get_submodule(FAMILIES[name][4])
    assert qm.num_layers(model) == BLOCKS
    assert qm.residual_width(model) == WIDTH


def test_padding_and_batching_change_nothing(family):
    """Right padding without a mask: each document as if it ran alone.

    Not to the bit: a matrix product of another height may add in another order. In float32, with residuals
    of order 1, the worst seen is 5e-6; a token that does see another one moves by 0.08 or more.
    """
    _, model = family
    documents = [token_ids(1, length, seed=length) for length in (3, 11, 7, 1)]
    batch = torch.zeros(len(documents), 11, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, document in enumerate(documents):
        batch[row, : document.shape[1]] = document
        mask[row, : document.shape[1]] = 1
    layers = [1, BLOCKS - 1]
    unmasked = qm.residuals(model, batch, layers)
    masked = qm.residuals(model, batch, layers, attention_mask=mask)
    other_padding = qm.residuals(model, batch.where(mask.bool(), 5), layers)
    for row, document in enumerate(documents):
        alone = qm.residuals(model, document, layers)
        for layer in layers:
            for several in (unmasked, masked, other_padding):
                part = several[layer][row, : document.shape[1]]
                torch.testing.assert_close(part, alone[layer][0], rtol=1e-5, atol=1e-5)


def test_stop_skips_later_blocks_and_the_head(family):
    _, model = family
    calls = []
    blocks = qm.decoder_layers(model)
    handles = [block.register_forward_pre_hook(lambda *_, i=i: calls.append(i)) for i, block in enumerate(blocks)]
    handles.append(model.get_output_embeddings().register_forward_pre_hook(lambda *_: calls.append("head")))
    after = []
    try:
        with qm.capture(model, [0, 2]) as whole:
            model(input_ids=token_ids(), use_cache=False)
            after.append("whole")
        everything, calls[:] = list(calls), []
        with qm.capture(model, [2, 0], stop=True) as part:
            model(input_ids=token_ids(), use_cache=False)
            after.append("part")
    finally:
        for handle in handles:
            handle.remove()
    assert everything == [0, 1, 2, 3, "head"]
    assert calls == [0, 1, 2]
    assert after == ["whole"]  # as documented
    assert sorted(part) == [0, 2]
    assert torch.equal(part[0], whole[0]) and torch.equal(part[2], whole[2])


def test_no_gradients_inside_and_mode_restored(llama):
    ids = token_ids()
    with qm.capture(llama, [1]) as residual:
        logits = llama(input_ids=ids).logits
    assert not logits.requires_grad and not residual[1].requires_grad
    assert torch.is_grad_enabled()
    with qm.capture(llama, [1], stop=True):
        llama(input_ids=ids)
    assert torch.is_grad_enabled()
    assert llama(input_ids=ids).logits.requires_grad


def test_hooks_are_removed_after_an_exception(llama):
    before = hook_count(llama)
    with pytest.raises(RuntimeError, match="mine"):
        with qm.capture(llama, range(BLOCKS)):
            assert hook_count(llama) == before + BLOCKS
            raise RuntimeError("mine")
    assert hook_count(llama) == before and torch.is_grad_enabled()


def test_nested_captures(llama):
    ids = token_ids()
    with qm.capture(llama, [3]) as whole:
        llama(input_ids=ids)
    with qm.capture(llama, [0, 3]) as outer:
        with qm.capture(llama, [0, 1], stop=True) as inner:  # the inner stop must not end the outer
            llama(input_ids=ids)
        assert sorted(outer) == [0]
        llama(input_ids=ids)
    assert torch.equal(inner[0], outer[0]) and torch.equal(outer[3], whole[3])
    reached = []
    with qm.capture(llama, [1], stop=True) as outer:  # the outer stop passes through the inner capture
        with qm.capture(llama, [0]) as inner:
            llama(input_ids=ids)
            reached.append("inner")
        reached.append("outer")
    assert reached == [] and sorted(outer) == [1] and sorted(inner) == [0]
    assert hook_count(llama) == hook_count(build("llama"))


class Toy(nn.Module):
    """Blocks whose output the test chooses."""

    class Block(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.wrap = wrap

        def forward(self, x):
            return self.wrap(x + 1)

    def __init__(self, wrap, blocks=3):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(self.Block(wrap) for _ in range(blocks))

    def forward(self, x):
        for block in self.model.layers:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: (x, "cache", None)])
def test_tensor_and_tuple_blocks(wrap):
    toy, x = Toy(wrap), torch.arange(24.0).reshape(2, 3, 4)
    with qm.capture(toy, [0, 2]) as residual:
        toy(x)
    assert torch.equal(residual[0], x + 1) and torch.equal(residual[2], x + 3)


def test_later_writes_do_not_reach_the_copy():
    toy = Toy(lambda x: x)
    with qm.capture(toy, [0]) as residual:
        toy(torch.zeros(1, 2, 4)).mul_(100)
        out = toy.model.layers[0](torch.zeros(1, 2, 4))
        out.fill_(100)
    assert torch.equal(residual[0], torch.ones(1, 2, 4))


def test_blocks_that_put_out_something_else():
    for wrap in (lambda x: x[0], lambda x: {"h": x}, lambda x: x[None]):
        toy = Toy(wrap, blocks=1)
        with pytest.raises(ModelError, match="Block 0 of Toy puts out"), qm.capture(toy, [0]):
            toy(torch.zeros(2, 3, 4))
        assert hook_count(toy) == 0


@pytest.mark.parametrize("layers", [[-1], [4], [0, 9], [], [1.0], [True], ["1"]])
def test_layers_out_of_range(llama, layers):
    before = hook_count(llama)
    with pytest.raises(ModelError, match="layers 0 to 3"), qm.capture(llama, layers):
        pytest.fail("the with-block must not start")
    assert hook_count(llama) == before


def test_hooks_that_never_fire_are_an_error(llama):
    with (
        pytest.raises(ModelError, match=r"Nothing was captured at layers \[1, 2\]"),
        qm.capture(llama, [1, 2]),
    ):
        pass
    with pytest.raises(ModelError, match=r"at layers \[2\]"), qm.capture(llama, [1, 2]):
        with qm.capture(llama, [1], stop=True):
            llama(input_ids=token_ids())

    def fast_path(
        module,
    ):  # what a compiler or an inference engine does: the block's forward without __call__
        return lambda *args, **kwargs: type(module).forward(module, *args, **kwargs)

    toy = Toy(lambda x: x)
    with pytest.raises(ModelError, match="compiled"), qm.capture(toy, [0, 1, 2]):
        x = torch.zeros(1, 2, 4)
        for block in toy.model.layers:
            x = fast_path(block)(x)


def test_blocks_are_not_guessed():
    with pytest.raises(ModelError, match="no module list"):
        qm.decoder_layers(nn.Linear(2, 2))
    t5 = pytest.importorskip("transformers")
    encoder_decoder = t5.T5ForConditionalGeneration(
        t5.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    )
    with pytest.raises(ModelError, match=r"encoder.block \(2\), decoder.block \(2\)"):
        qm.decoder_layers(encoder_decoder)
    toy = Toy(lambda x: x)
    toy.config = SimpleNamespace(num_hidden_layers=7)
    with pytest.raises(ModelError, match=r"its config says 7 blocks, and it holds model.layers \(3\)"):
        qm.decoder_layers(toy)
    with pytest.raises(ModelError, match="hidden_size"):
        qm.residual_width(toy)
    toy.config.num_hidden_layers = 3
    toy.model.layers[0].experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))  # not blocks
    assert qm.decoder_layers(toy) is toy.model.layers


def test_bad_ids(llama):
    for ids in (torch.tensor([[0, VOCAB]]), torch.tensor([[-1, 3]])):
        with pytest.raises(InputError, match=f"0 to {VOCAB - 1}"):
            qm.residuals(llama, ids, [0])
    for ids in (torch.tensor([1, 2]), torch.zeros(2, 0, dtype=torch.long), torch.zeros(1, 2)):
        with pytest.raises(InputError, match="integers"):
            qm.residuals(llama, ids, [0])
    with pytest.raises(InputError, match="pad on the right"):
        qm.residuals(llama, token_ids(2, 3), [0], attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]))


# --- loading ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(llama, tmp_path_factory) -> Path:
    import tokenizers
    import transformers

    path = tmp_path_factory.mktemp("model") / "tiny"
    llama.save_pretrained(path)
    words = {f"w{i}": i for i in range(VOCAB)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0").save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_load_model(folder, llama):
    model, tokenizer = qm.load_model(folder, device="cpu", dtype="float32")
    assert not model.training and model.dtype == torch.float32 and model.config.use_cache is False
    ids = torch.tensor([tokenizer("w5 w9 w60")["input_ids"]])
    assert ids.tolist() == [[5, 9, 60]]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, llama(input_ids=ids).logits)
    assert qm.load_model(str(folder), "cpu", torch.float16)[0].dtype == torch.float16
    automatic = qm.load_model(folder, "cpu")[0].dtype
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert automatic == (torch.bfloat16 if "bf16" in flags else torch.float32)


def refused(path, pattern, **options):
    with pytest.raises(ModelError, match=pattern) as caught:
        qm.load_model(path, **({"device": "cpu", "dtype": "float32"} | options))
    assert "\n" not in str(caught.value)  # one paragraph


def test_load_refuses_names_and_options(folder, tmp_path):
    refused(tmp_path / "nowhere" / "model", "there is no such folder")
    refused("a/b/c", "Hub name such as")
    refused(folder / "config.json", "there is no such folder")
    refused(folder, "auto, bfloat16, float16, float32", dtype="int8")
    refused(folder, "cpu, cuda, cuda:1 or auto", device="gpu")
    refused(folder, "CUDA devices here", device="cuda:99")


def test_load_offline(monkeypatch):
    monkeypatch.setattr(packages, "hub_reachable", lambda: False)
    refused("qscope-test/not-there", "cannot be reached")


def test_load_refuses_broken_folders(copy):
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    refused(copy, "damaged, incomplete")
    weights.write_bytes(b"")
    refused(copy, "damaged, incomplete")
    weights.write_bytes(whole)

    import safetensors.torch

    state = safetensors.torch.load_file(weights)
    del state["model.layers.2.mlp.up_proj.weight"]
    safetensors.torch.save_file(state, weights, metadata={"format": "pt"})
    refused(copy, "1 tensors are missing, model.layers.2.mlp.up_proj.weight first")
    weights.write_bytes(whole)

    edit(copy / "config.json", hidden_size=64)
    refused(copy, "could not be loaded")
    edit(copy / "config.json", hidden_size=WIDTH, model_type="no-such-type")
    refused(copy, "could not be loaded")
    (copy / "config.json").write_text("{")
    refused(copy, "could not be loaded")
    (copy / "config.json").unlink()
    refused(copy, "no config.json")


def test_load_runs_no_code_and_reads_no_pickle(copy, tmp_path):
    marker = tmp_path / "ran"
    (copy / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    edit(copy / "config.json", auto_map={"AutoConfig": "modeling_evil.Evil"}, model_type="evil")
    refused(copy, "could not be loaded")
    assert not marker.exists()
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused(copy, "no pickled weights")


def test_load_refuses_a_tokenizer_of_another_model(copy):
    content = json.loads((copy / "tokenizer.json").read_text())
    content["model"]["vocab"]["beyond"] = VOCAB
    (copy / "tokenizer.json").write_text(json.dumps(content))
    refused(copy, f"ids up to {VOCAB}, and the model knows only 0 to {VOCAB - 1}")


# --- identity --------------------------------------------------------------------------------------------


def test_model_hash(folder, copy, llama, tmp_path):
    known = qm.model_hash(folder)
    assert qm.model_hash(str(copy)) == known and len(known) == 64
    edit(copy / "config.json", transformers_version="0.0", _name_or_path="elsewhere")
    assert qm.model_hash(copy) == known  # the same model, saved by another release
    edit(copy / "config.json", rms_norm_eps=1e-3)
    assert qm.model_hash(copy) != known
    shutil.copy(folder / "config.json", copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert qm.model_hash(copy) != known
    llama.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    sharded = qm.model_hash(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    last = sorted((tmp_path / "sharded").glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1] + b"x")
    assert qm.model_hash(tmp_path / "sharded") != sharded
    with pytest.raises(ModelError, match="must hold config"):
        qm.model_hash(tmp_path)


def test_model_hash_of_a_module():
    one = build("llama")
    known = qm.model_hash(one)
    assert qm.model_hash(build("llama")) == known
    with torch.no_grad():
        one.model.layers[3].mlp.up_proj.weight[0, 0] += 1
    assert qm.model_hash(one) != known
    assert qm.model_hash(build("llama").to(torch.bfloat16)) != known


def test_model_hash_of_a_hub_snapshot_reads_the_blob_name(folder, tmp_path):
    """The Hub's cache stores a weight file under its sha256, with a link from the snapshot."""
    digest = file_sha256(folder / "model.safetensors")
    snapshot, blobs = tmp_path / "snapshots" / "rev", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shutil.copy(folder / "config.json", snapshot)
    (blobs / digest).write_bytes(b"not read")
    (snapshot / "model.safetensors").symlink_to(blobs / digest)
    assert qm.model_hash(snapshot) == qm.model_hash(folder)


def test_tokenizer_hash(folder, copy):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = qm.tokenizer_hash(tokenizer)
    tokenizer(["w1", "w1 w2"], padding=True, truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.padding is not None
    assert qm.tokenizer_hash(tokenizer) == known
    content = json.loads((copy / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (copy / "tokenizer.json").write_text(json.dumps(content))
    assert qm.tokenizer_hash(AutoTokenizer.from_pretrained(copy)) != known
