"""One of several processes that train together, for test_parallel.py: `parallel_worker.py PLAN FOLDER`.

Runs every check of a plan on all processes. Process 0 compares with one process alone and writes what failed, as JSON.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch

if __name__ == "__main__":
    # Operators import torch._dynamo at their first call, to tell it not to trace them: longer than all checks take.
    torch._disable_dynamo = lambda function=None, recursive=True: function or (lambda inner: inner)

from qscope import distributed
from qscope.errors import InputError, QscopeError
from qscope.ops import topk_encode
from qscope.training import Recipe, SAETrainer, checkpoint, losses, parallel
from qscope.training.activations import ModelActivations

D, N, STEPS, F = 24, 64, 9, 51  # 51 rows do not divide by 2
HALF = 4  # the dead features listed in this step are in use in the next
# Adam's eps is near the size of the gradients here, so that a difference in rounding stays one: with the usual eps, an
# element whose terms cancel moves by the learning rate in the direction that rounding decides.
BASE = {"d_sae": F, "k": 3, "lr": 1e-3, "eps": 1e-2, "ema": 0.9, "dead_after_tokens": 3 * N, "dead_every": 2}
CASES = {
    "topk": {},
    "multi": {"multi_topk": True},
    "batch": {"objective": "batch_topk"},
    "batch-nested": {"objective": "batch_topk", "prefixes": (12, 30)},
    "matryoshka": {"objective": "matryoshka", "prefixes": (12, 30)},
    "jumprelu": {"objective": "jumprelu", "row_limit": 30, "bandwidth": 0.1},
    "linear-jumprelu": {"objective": "jumprelu", "row_limit": 30, "l0_penalty": "linear", "l0_weight": 1e-3},
    "transcoder": {},
    "wide": {"k": 40, "grad_clip": 0.05},  # more than half of F: a process has fewer rows than K
}
# Float32 sums in another order: 2^-24 for each of some hundred terms that partly cancel. Over the steps that follow
# they stay below these, unless a wrong feature is chosen, a term is missing or counted twice (then 1e-3 and more).
NEAR_WEIGHTS, NEAR_LOG = 2e-6, 2e-5


def data(case, count=STEPS):
    """Sample and batches (input, target or None); the same on every process. Half of the features fire rarely."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(40, D, generator=generator)

    def batch(n):
        x = (torch.rand(n, 40, generator=generator) * (torch.rand(n, 40, generator=generator) < 0.1)) @ rows + 1
        return (x, x[:, : D - 5].flip(1) * 3) if case == "transcoder" else (x, None)

    return batch(256), [batch(N) for _ in range(count)]


def trainer(case, group=None, sample=None, **more):
    made = SAETrainer(
        Recipe(**BASE | CASES[case] | more), D, d_out=D - 5 if case == "transcoder" else None,
        total_steps=STEPS, batch_tokens=N, group=group,
    )  # fmt: skip
    if sample is not None:
        made.initialise(*sample)
        _weaken(made, 3, 19)
        if case == "batch":
            _weaken(made, 30, 37)
    return made


def _weaken(made, start, end):
    """These features never fire: they die, and AuxK works on them. 3..18 are at home on the first of 2 processes."""
    first = made.across.rows(F).start
    made.parameters["b_enc"].W[max(0, start - first) : max(0, end - first)] = -50.0


def mine(batch, group):
    """This process' slice."""
    return [None if part is None else parallel.slice_of({0: part}, group)[0] for part in batch]


def run(made, batches, group=None):
    return [made.step(*(mine(batch, group) if group else batch)).log() for batch in batches]


def compare_logs(got, want, near=NEAR_LOG):
    for ours, right in zip(got, want, strict=True):
        for name, value in right.items():
            assert abs(ours[name] - value) <= near * max(abs(value), 1e-3), (name, ours[name], value, right["step"])


def compare_states(got, want):
    assert list(got) == list(want)
    for name, right in want.items():
        ours = got[name]
        if not isinstance(right, torch.Tensor):
            assert ours == right, name
        elif not right.is_floating_point():
            assert torch.equal(ours, right), name
        else:
            assert ours.shape == right.shape and ours.dtype == right.dtype, name
            size = max(1.0, float(right.abs().max().nan_to_num())) if name.endswith(("W", "ema")) else float(
                right.abs().max().nan_to_num())  # fmt: skip
            assert bool((ours.isnan() == right.isnan()).all()), name
            apart = float((ours - right).abs().nan_to_num().max())
            assert apart <= (NEAR_WEIGHTS if name.endswith(("W", "ema")) else NEAR_LOG) * size, (name, apart, size)


# --- checks ----------------------------------------------------------------------------------------------


def check_training(group, folder, case):
    """A run gives the single process' run to rounding: every figure of every step, and the state at the end."""
    sample, batches = data(case)
    # only the first process' sample counts
    other = sample if group.first else tuple(None if part is None else part[:99] + 9 for part in sample)
    made = trainer(case, group, other)
    log = run(made, batches, group)
    assert all(log == one for one in group.world.objects(log)), "the processes report different figures"
    state, weights = made.state_dict(), made.export()
    if group.first:
        alone = trainer(case, None, sample)
        right = run(alone, batches)
        assert alone.dead_in_all >= 16 and right[-1]["aux"] > 1e-4, "AuxK must be at work"
        assert right[-1]["skipped"] == 0 and (case != "batch" or 0 < float(alone.threshold) < 9)
        compare_logs(log, right)
        compare_states(state, alone.state_dict())
        for name, tensor in alone.export().items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-5)
    else:
        assert state == {}


def check_bf16(group, folder):
    """bf16 products depend on how many rows there are: a score in the last place flips a feature now and then."""
    sample, batches = data("topk")
    log = run(trainer("topk", group, sample, precision="bf16"), batches, group)
    if group.first:
        right = run(trainer("topk", None, sample, precision="bf16"), batches)
        for ours, one in zip(log, right, strict=True):
            assert abs(ours["fvu"] - one["fvu"]) < 2e-3 * one["fvu"]


def check_selection(group, folder):
    """The K largest over all processes are the ids that one process finds, with equal scores in different shards, rows
    with fewer than K features above 0, and a row of NaN; BatchTopK's selection over the whole batch too."""
    generator = torch.Generator().manual_seed(3)
    x, W = (torch.randn(n, D, generator=generator) for n in (N, F))
    W[40:] = W[:11]  # ties between the first process and the last
    x[5] = x[60]
    bias = torch.full((F,), -5.0)
    right, right_ids = topk_encode(x, W, bias, 9)
    assert 0.05 < float((right == 0).float().mean()) < 0.9
    assert int(((right[:, :-1] == right[:, 1:]) & (right[:, 1:] > 0)).sum()) > 9, "ties among what is selected"
    across = parallel.Together(group, F)
    rows = across.rows(F)
    slot = slice(group.dp.rank * N // group.dp.size, (group.dp.rank + 1) * N // group.dp.size)
    found = across.encode(x[slot], W[rows], bias[rows], 9, "exact")
    assert torch.equal(found.every, right[slot])
    assert torch.equal(across.over_features(found.acts), right[slot]), "every winner belongs to one process"
    ids = across.over_features((found.ids + rows.start) * (found.acts > 0))
    assert torch.equal(ids, right_ids[slot] * (right[slot] > 0))
    weights = losses.Weights(W, bias, W, torch.zeros(D))
    for k, limit in ((2, 9), (1, 3)):
        codes, border = losses.select_batch_topk(x, weights, k, limit, "exact")
        local = losses.Weights(W[rows], bias[rows], W[rows], torch.zeros(D))
        ours, our_border = losses.select_batch_topk(x[slot], local, k, limit, "exact", across)
        assert float(border) == float(our_border)
        assert int(across.over_tokens(ours.overflow)) == int(codes.overflow)
        here = torch.zeros(len(x[slot]), F).scatter_add(1, ours.ids.long() + rows.start, ours.acts)
        whole = torch.zeros(N, F).scatter_add(1, codes.ids.long(), codes.acts)
        assert torch.equal(across.over_features(here), whole[slot])
    x[slot.start + 1, 2] = torch.nan
    found = across.encode(x[slot], W[rows], bias[rows], 9, "exact")
    assert bool(found.every[1].isnan().all()) and not bool(found.every[2:].isnan().any())
    assert bool(across.over_features(found.acts)[1].isnan().all())


def check_not_finite(group, folder):
    """A NaN in one process' slice changes no weight on any."""
    sample, batches = data("topk", 3)
    made = trainer("topk", group, sample)
    made.step(*mine(batches[0], group))
    before = {name: p.W.clone() for name, p in made.parameters.items()}
    batches[1][0][N - 1, 3] = torch.nan
    log = made.step(*mine(batches[1], group)).log()
    assert log["loss"] != log["loss"] and log["skipped"] > 0
    for name, p in made.parameters.items():
        assert torch.equal(p.W, before[name]), name
    assert made.step(*mine(batches[2], group)).log()["skipped"] == 0


def check_difference(group, folder):
    """One bit of one weight on one process stops all of them, by name."""
    sample, batches = data("topk", 3)
    made = trainer("topk", group, sample)
    made.step(*mine(batches[0], group))
    last = group.world.rank == group.world.size - 1
    weak = max(0, 4 - made.across.rows(F).start)  # the state of a row that no batch touches stays as it is
    name, row = ("W_dec", weak) if group.dp.size > 1 and group.tp.size == 1 else ("b_dec", 0)
    bits = made.parameters[name].exp_avg.view(torch.int32)
    if last:
        bits[row, 0] += 1 if name == "W_dec" else 1 << 12
    kept, parallel.CHECK_EVERY = parallel.CHECK_EVERY, 2
    try:
        made.step(*mine(batches[1], group))
    except distributed.GroupError as error:
        assert f"{name}.exp_avg" in str(error), error
        return
    finally:
        parallel.CHECK_EVERY = kept
    raise AssertionError("the difference was not noticed")


def check_saving(group, folder):
    """Half a run, saved for processes of another number; the same number goes on with the same bits."""
    sample, batches = data("batch")
    made = trainer("batch", group, sample)
    run(made, batches[:HALF], group)
    state = made.state_dict()
    name = f"world{group.world.size}-tp{group.tp.size}"
    if group.first:
        with checkpoint.locked(folder / name):
            checkpoint.save(folder / name, HALF, {"sae": state}, {}, 0, {})
    group.world.barrier()
    log = run(made, batches[HALF:], group)
    state = checkpoint.load(checkpoint.latest(folder / name)).trainers["sae"]
    assert len(state["dead"]) > 16 or not group.first
    again = trainer("batch", group)
    again.load_state_dict(state)
    assert run(again, batches[HALF:], group) == log
    for name, p in made.parameters.items():
        assert torch.equal(p.W, again.parameters[name].W), name
    if group.first:
        finished(log, trainer("batch"), state, batches)


def finished(log, alone, state, batches):
    """One process goes on from what several have saved."""
    alone.load_state_dict(state)
    compare_logs(log, run(alone, batches[HALF:]))


def check_resuming(group, folder, origin):
    """Goes on from a checkpoint of another number of processes, and ends as one process alone does."""
    sample, batches = data("batch")
    if origin == "alone":
        alone = trainer("batch", None, sample)
        run(alone, batches[:HALF])
        state = alone.state_dict()
    else:
        state = checkpoint.load(checkpoint.latest(folder / origin)).trainers["sae"]
    made = trainer("batch", group)
    made.load_state_dict(state)
    log = run(made, batches[HALF:], group)
    ended = made.state_dict()
    if group.first:
        alone = trainer("batch", None, sample)
        right = run(alone, batches)
        compare_logs(log, right[HALF:])
        compare_states(ended, alone.state_dict())


def check_layers(group, folder):
    """SAEs of five layers, each at home on one place along spread; process 0 gets all states."""
    names = [f"layer {i}" for i in range(5)]
    sample, batches = data("topk", 2)
    mine_ = {}
    for number, name in enumerate(names):
        if group.owns(number):
            mine_[name] = trainer("topk", group, sample, seed=number)
            run(mine_[name], batches, group)
    assert len(mine_) in (5 // group.spread.size, 5 // group.spread.size + 1)
    states = parallel.collect_states(group, names, mine_)
    assert list(states) == (names if group.first else [])
    for number, name in enumerate(names if group.first else []):
        alone = trainer("topk", None, sample, seed=number)
        run(alone, batches)
        compare_states(states[name], alone.state_dict())


def check_forward(group, folder):
    """The model's work is divided, and every process gets the rows of all windows in their order."""
    seen = []

    class Model(ModelActivations):
        def __init__(self):
            self.axis = group.world

        def _forward_here(self, ids):
            seen.append(len(ids))
            return {7: torch.stack([ids.float(), -ids.float()], -1)}

    producer = Model()
    for count in (1, 2, 5):
        ids = torch.arange(count * 3).view(count, 3)
        assert torch.equal(producer._forward(ids)[7], torch.stack([ids.float(), -ids.float()], -1))
    assert seen == [-(-count // group.world.size) for count in (1, 2, 5)]


def check_sums(group, folder):
    """In the order of ranks and the same on all of them, also where each process adds its part only."""
    world = group.world
    terms = [torch.randn(9001, generator=torch.Generator().manual_seed(i)) * 10.0**i for i in range(world.size)]
    right = terms[0].clone()
    for term in terms[1:]:
        right += term
    assert torch.equal(world.sum(terms[world.rank]), right)
    assert torch.equal(world.sum(terms[world.rank][:40]), right[:40])
    kept, distributed.BLOCK = distributed.BLOCK, 4099  # several blocks, the last one short
    assert torch.equal(world.sum_(terms[world.rank].clone()), right)
    distributed.BLOCK = kept
    assert world.sum(torch.tensor(world.rank)) == sum(range(world.size))
    assert world.gather(torch.tensor([True])).shape == (world.size, 1)
    assert float(world.broadcast(torch.tensor(float(world.rank)), 1)) == 1
    assert world.any(torch.tensor([world.rank == 1, False])).tolist() == [True, False]


def check_refusals(group, folder):
    sample, batches = data("topk", 1)
    try:
        trainer("topk", group, sample).step(batches[0][0][: N // 4])
        raise AssertionError("a slice of another length was taken")
    except InputError as error:
        assert f"batch_tokens={N}" in str(error) and "same number" in str(error)
    if group.tp.size > 1:
        try:
            SAETrainer(Recipe(d_sae=1, k=1), D, total_steps=9, batch_tokens=N, group=group)
            raise AssertionError("fewer features than processes were taken")
        except InputError as error:
            assert "d_sae=1" in str(error)


# --- plans -----------------------------------------------------------------------------------------------

EVERY = [("training", case) for case in CASES]
REST = [("selection",), ("not_finite",), ("difference",), ("saving",), ("refusals",)]
PLANS = {
    "two": {
        (1, 2, 1): [("sums",), ("forward",), *EVERY, *REST, ("resuming", "alone")],
        (1, 1, 2): [*EVERY, *REST, ("bf16",), ("resuming", "alone"), ("resuming", "world2-tp1")],
        (2, 1, 1): [("layers",)],
    },
    "four": {
        (1, 2, 2): [("sums",), *(("training", c) for c in ("batch-nested", "jumprelu")), *REST,
                    ("resuming", "world2-tp2"), ("resuming", "world2-tp1")],
        (1, 1, 4): [("training", "wide"), ("training", "matryoshka"), ("resuming", "world4-tp2")],
        (2, 1, 2): [("layers",)],
    },
}  # fmt: skip


def names_of(plan):
    return [" ".join(["x".join(map(str, sizes)), *check]) for sizes, checks in PLANS[plan].items() for check in checks]


def run_plan(plan, folder):
    with distributed.init(dp=None, timeout=60) as joined:
        outcome = {}
        for sizes, checks in PLANS[plan].items():
            group = distributed.mesh_of(joined.device, sizes)
            for check, *arguments in checks:
                failure = None
                try:
                    globals()[f"check_{check}"](group, folder, *arguments)
                except Exception:
                    failure = traceback.format_exc()
                failed = [text for text in group.world.objects(failure) if text]
                outcome[" ".join(["x".join(map(str, sizes)), check, *arguments])] = failed
                if joined.first:
                    (folder / f"{plan}.json").write_text(json.dumps(outcome))


def stop_answering():
    """Process 1 is stopped while the other waits for it."""
    with distributed.init(dp=2, timeout=3) as group:
        for turn in range(3):
            if turn == 2 and group.world.rank == 1:
                print("lost", flush=True)
                os.kill(os.getpid(), signal.SIGSTOP)
            group.dp.sum(torch.ones(3))


def end(folder):
    """Process 1 ends in the middle of a run that was saved before."""
    sample, batches = data("topk")
    with distributed.init(dp=2, timeout=60) as group:
        made = trainer("topk", group, sample)
        for number, batch in enumerate(batches):
            if number == HALF:
                state = made.state_dict()
                if group.first:
                    with checkpoint.locked(folder):
                        checkpoint.save(folder, HALF, {"sae": state}, {}, 0, {})
                group.world.barrier()
            if number == HALF + 2 and group.world.rank == 1:
                print("lost", flush=True)
                os._exit(9)
            made.step(*mine(batch, group))


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        if sys.argv[1] == "hang":
            stop_answering()
        elif sys.argv[1] == "end":
            end(Path(sys.argv[2]))
        else:
            run_plan(sys.argv[1], Path(sys.argv[2]))
    except QscopeError as error:  # as the command line does
        print(f"error: {error}", file=sys.stderr, flush=True)
        distributed.leave(2)
