"""Streams of a model's activations: which rows, and that a restored stream goes on to the bit."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from qscope.errors import InputError, ModelError
from qscope.training import checkpoint
from qscope.training.activations import ModelActivations
from qscope.training.text import DatasetText

_spec = importlib.util.spec_from_file_location("supply", Path(__file__).with_name("supply.py"))
supply = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(supply)
tiny, batches, drain, equal, make_model, rows_of, stream_of, windows_of = (
    supply.tiny,
    supply.batches,
    supply.drain,
    supply.equal,
    supply.make_model,
    supply.rows_of,
    supply.stream_of,
    supply.windows_of,
)


def test_rows_are_what_transformers_puts_out(tiny):
    """Rows before shuffling against hidden_states of the same windows."""
    producer = ModelActivations(tiny.model, windows_of(tiny), [0, 1], None)
    parts = list(producer.produce(10**6))
    expected = {0: [], 1: []}
    for batch in drain(windows_of(tiny)):
        with torch.no_grad():
            hidden = tiny.model(batch.ids, output_hidden_states=True).hidden_states
        for layer in expected:
            expected[layer].append(hidden[layer + 1][batch.usable])
    assert producer.done and max(len(part[0]) for part in parts) <= producer.max_rows
    for layer in expected:
        found = torch.cat([part[layer] for part in parts])
        assert torch.equal(found, torch.cat(expected[layer])), "the same operations on the same batches"


def test_mlp_ends_belong_together(tiny):
    """A transcoder's input and target: the MLP of block 1 maps one to the other; the residual is of the same token."""
    stream = stream_of(tiny, ["mlp_in.1", "mlp_out.1", 0, 1])
    batch = stream.next(512)
    with torch.no_grad():
        out = tiny.model.model.layers[1].mlp(batch["mlp_in.1"])
        normed = tiny.model.model.layers[1].post_attention_layernorm(batch[1] - batch["mlp_out.1"])
    # float32 sums of 32 terms in another batch shape
    torch.testing.assert_close(out, batch["mlp_out.1"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(normed, batch["mlp_in.1"], rtol=1e-4, atol=1e-5)


def test_a_stream_serves_all_usable_tokens_once(tiny):
    stream = stream_of(tiny)
    served = torch.cat([batch[0] for batch in [*batches(stream, 100), stream.next(stream.left)]])
    producer = ModelActivations(tiny.model, windows_of(tiny), [0], None)
    plain = torch.cat([part[0] for part in producer.produce(10**6)])
    order = lambda x: x[np.lexsort(x.numpy().T)]  # noqa: E731
    assert torch.equal(order(served), order(plain)) and not torch.equal(served, plain)
    counts = stream.counts()
    assert counts["served"] == counts["kept"] == len(plain) == counts["tokens"] - counts["dropped_first"]


@pytest.mark.parametrize("n", [96, 700])
def test_a_restored_model_stream_goes_on_to_the_bit(tiny, tmp_path, n):
    """Through a checkpoint on disk, in a stream that did other things before."""
    options = dict(points=[2, "mlp_out.0"], cycle=True, tokens=14_000, context_size=24)
    stream = stream_of(tiny, **options)
    saved, found = {}, []
    for step in range(14_000 // n):
        if step % (29 if n == 96 else 4) == 0:
            saved[step] = checkpoint.save(tmp_path, step, {}, stream.state(), 0, {}, keep_last=10**6)
        found.append(stream.next(n))
    end = stream.counts()
    assert end["epoch"] == 1 and len(saved) >= 5
    for cut, path in saved.items():
        other = stream_of(tiny, **options)
        other.next(3)
        other.restore(checkpoint.load(path).stream)
        assert equal([other.next(n) for _ in found[cut:]], found[cut:]), cut
        assert other.counts() == end


def test_a_state_of_other_settings_is_refused_naming_them(tiny):
    state = stream_of(tiny).state()
    for options, message in (
        (dict(seed=4), "seed: 3 -> 4"),
        (dict(points=[0, 1]), r"points\[1\]: \"2\" -> \"1\""),
        (dict(buffer_tokens=4096), "buffer_tokens: 2048 -> 4096"),
        (dict(context_size=16), "context_size: 32 -> 16"),
        (dict(first_token="keep"), "first_token"),
        (dict(norm_multiple=5.0), "norm_multiple: 10.0 -> 5.0"),
        (dict(texts=tiny.texts[:5]), "text"),
        (dict(model=make_model().to(torch.bfloat16)), "dtype: .*float32.* -> .*bfloat16"),
    ):
        with pytest.raises(InputError, match=message):
            stream_of(tiny, **options).restore(state)


def test_planted_tokens_are_filtered_and_counted(tiny):
    """One token's embedding is NaN, another's is large: each occurrence is left out and counted at every layer."""
    model = make_model()
    windows = drain(windows_of(tiny))
    ids = torch.cat([batch.ids[batch.usable] for batch in windows])
    common = ids.bincount(minlength=1024).argsort(descending=True)
    large, nan = int(common[40]), int(common[60])
    with torch.no_grad():
        model.model.embed_tokens.weight[large] *= 3000
        model.model.embed_tokens.weight[nan] = float("nan")
    # A window with NaN is NaN as a whole: softmax gives what comes later the weight 0, and 0 times NaN is NaN.
    seen = torch.cat([(batch.ids == nan).any(1, keepdim=True).expand_as(batch.ids) for batch in windows])
    usable = torch.cat([batch.usable for batch in windows])
    broken = int((seen & usable).sum())
    extreme = int(((torch.cat([batch.ids for batch in windows]) == large) & ~seen & usable).sum())
    assert broken > 100 and extreme > 10
    stream = stream_of(tiny, [0, 1], model=model)
    found = torch.cat([batch[0] for batch in [*batches(stream, 64), stream.next(stream.left)]])
    assert bool(found.isfinite().all()) and float(found.norm(dim=1).max()) < 20 * float(found.norm(dim=1).median())
    counts = stream.counts()
    assert counts["nonfinite"] == {"0": broken, "1": broken}
    assert counts["extreme_norm"] == {"0": extreme, "1": extreme}
    assert counts["kept"] == len(found) == len(ids) - broken - extreme


def test_a_model_that_only_makes_nan_is_an_error(tiny):
    model = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = float("nan")
    with pytest.raises(ModelError, match="No activation of 16 forward passes in a row could be used"):
        stream_of(tiny, model=model, cycle=True).next(10)


def test_too_little_text_is_refused_before_the_model_runs(tiny, monkeypatch):
    usable = windows_of(tiny).count(10**9)
    stream = stream_of(tiny, tokens=usable + 1)
    monkeypatch.setattr(ModelActivations, "_forward", None)
    with pytest.raises(InputError, match=rf"{usable + 1:,} tokens .* holds only {usable:,} that can be used"):
        stream.next(64)
    monkeypatch.undo()
    stream = stream_of(tiny, tokens=usable)
    assert sum(len(batch[0]) for batch in batches(stream, 1000)) == usable // 1000 * 1000
    assert len(stream.next(stream.left)[0]) == usable % 1000


def test_a_text_of_unknown_length_that_ends_early_says_how_many_there_were(tiny):
    import datasets

    text = DatasetText(datasets.Dataset.from_list(rows_of(tiny.texts)).to_iterable_dataset())
    usable = windows_of(tiny).count(10**9)
    stream = stream_of(tiny, texts=text, tokens=10**6)
    with pytest.raises(InputError, match=rf"1,000,000 tokens .* gave only {usable:,}\."):
        batches(stream, 64)
    stream = stream_of(tiny, texts=text, tokens=2 * usable, cycle=True)
    while stream.served + 64 <= 2 * usable:
        stream.next(64)
    assert stream.counts()["epoch"] >= 1


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([3], "layers 0 to 2"),
        ([-1], "layers 0 to 2"),
        ([True], "layers 0 to 2"),
        ([], "at least one of 0 to 2"),
        ([1, 1], "each once"),
        (["mlp_in.7"], "mlp_out.LAYER"),
        (["attn.1"], "mlp_in.LAYER"),
    ],
)
def test_points_that_do_not_exist(tiny, points, message):
    with pytest.raises(InputError, match=message):
        stream_of(tiny, points)


def test_other_impossible_streams(tiny):
    with pytest.raises(InputError, match="made for at most 128"):
        stream_of(tiny, context_size=129)
    with pytest.raises(InputError, match="first_token is 'skip'"):
        stream_of(tiny, first_token="skip")
    with pytest.raises(InputError, match="at least 512"):
        stream_of(tiny, buffer_tokens=500)
    model = make_model()
    model.model.layers[1].mlp, model.model.layers[1].feed_forward = None, model.model.layers[1].mlp
    with pytest.raises(ModelError, match="no module called mlp"):
        stream_of(tiny, ["mlp_in.1"], model=model)
