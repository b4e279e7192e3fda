"""`qscope sft` on a tiny model: arms, resumption, errors, and what the result says."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qscope.errors import InputError, StoreError
from qscope.post_training.switching import Interval, contains, wilson

pytest.importorskip("trl", reason="the extra post-training")

from qscope.cli import to_json
from qscope.report import sft_page, sft_text
from qscope.workflows import sft, sft_arms, sft_data, sft_result, sft_train
from qscope.workflows.sft import SFTConfig, run

CHATML = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def chat(question, answer, group):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "lang": group}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny, texts):
    """English in two groups and Russian; a third of the answers of one group end in Russian."""
    root = tmp_path_factory.mktemp("sft")
    parts = [text[i * 60 : i * 60 + 50].strip() for text in texts[:24] for i in range(2)]
    rows = []
    for i, part in enumerate(parts):
        rows.append(chat(f"say {i}", part + (" привет мир" if i % 3 == 0 else ""), "en" if i % 2 else "de"))
        rows.append(chat(f"скажи {i}", "привет мир и ещё раз привет", "ru"))
    template = root / "chat.jinja"
    template.write_text(CHATML)
    return SimpleNamespace(root=root, data=write(root / "data.jsonl", rows), template=template, rows=rows)


@pytest.fixture(scope="module")
def base(tiny, world):
    return SFTConfig(
        data=world.data, target_group="ru", out=world.root / "out", model=tiny.model, sae=tuple(tiny.saes.values()),
        layers=(0, 2), chat_template=world.template, arms=("none", "penalty", "token", "filter"), seeds=(0, 1), steps=2,
        batch=4, weight=(1.0,), max_length=48, held_out_share=0.25, prompts_per_group=3, samples=2, max_new_tokens=4,
        log_steps=1, learning_rate=1e-2, warmup_steps=0, draws=50, device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(base):
    return run(base)


def test_every_arm_and_seed_is_measured_on_the_same_prompts_and_examples(base, found):
    assert [(p.arm, p.seed) for p in found.points] == [
        ("base", -1), *((arm, seed) for seed in (0, 1) for arm in ("none", "penalty", "token", "filter"))
    ]  # fmt: skip
    assert [a.name for a in found.arms] == ["base", "none", "penalty 1", "token 1", "filter"]
    for point in found.points:
        assert point.sizes == [2.0] * 6 and point.nat_tokens == found.points[0].nat_tokens
        assert len(point.nats) == len(point.nat_tokens) and sum(point.nats) > 0
        assert point.switching.responses == 12
        name = sft_result.Point(point.arm, point.weight, point.seed).folder
        folder = base.out / "runs" / ("base" if point.arm == "base" else name)
        rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text(encoding="utf-8").splitlines()]
        assert len(rows) == 12 and {row["group"] for row in rows} == {"de", "en"}
        assert sum(contains(row["text"], ("Cyrillic",)) for row in rows) == point.switching.switched
        assert not (folder / "checkpoints").exists()
    trained = [p for p in found.points if p.arm == "penalty"]
    assert all(p.steps == 2 and [row["step"] for row in p.log] == [1, 2] for p in trained)
    assert all(row["term/penalty"] > 0 for p in trained for row in p.log)
    assert found.features == {"0": found.features["0"], "2": found.features["2"]}
    assert all(len(ids) == 2 for ids in found.features.values())
    assert all(v > 0 for values in found.nu.values() for v in values)
    kept = json.loads((base.out / "result.json").read_text())
    assert kept == json.loads(json.dumps(to_json(found)))


def test_summaries_are_those_of_the_points(found):
    for arm in found.arms:
        mine = [p for p in found.points if (p.arm, p.weight) == (arm.arm, arm.weight)]
        ratios = [sum(p.hits) / sum(p.sizes) for p in mine]
        assert arm.ratios == pytest.approx(ratios) and arm.ratio.value == pytest.approx(np.mean(ratios))
        losses = [sum(p.nats) / sum(p.nat_tokens) for p in mine]
        assert arm.loss.value == pytest.approx(np.mean(losses)) and arm.losses == pytest.approx(losses)
        assert arm.loss.low <= arm.loss.value <= arm.loss.high
    whole = {0: np.zeros(30), 1: np.zeros(30)}
    none = sft_result._ratio(whole, np.full(30, 4.0), 50)
    assert none == wilson(0, 30) and none.high > 0.1
    every = sft_result._ratio({0: np.full(30, 4.0)}, np.full(30, 4.0), 50)
    assert every == wilson(30, 30)
    mixed = sft_result._ratio({0: np.zeros(30), 1: np.full(30, 4.0)}, np.full(30, 4.0), 500)
    assert (mixed.value, mixed.low, mixed.high) == (0.5, 0.0, 1.0)
    filtered = next(p for p in found.points if p.arm == "filter")
    plain = next(p for p in found.points if p.arm == "none")
    assert 0 < filtered.examples < plain.examples
    for comparison in found.comparisons:
        by_name = {a.name: a for a in found.arms}
        one, other = by_name[comparison.penalty], by_name[comparison.other]
        assert comparison.ratio.value == pytest.approx(one.ratio.value - other.ratio.value)
        assert comparison.loss.value == pytest.approx(one.loss.value - other.loss.value)
    assert [c.other for c in found.comparisons] == ["none", "token 1", "filter"]


def test_held_out_loss_is_that_of_single_examples(base, found, tiny):
    """The base model, one held-out answer at a time, without padding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    tokenizer.chat_template = CHATML
    data = sft_data.load(base, ("Cyrillic",))
    nats, counts = [], []
    for example in data.held_out:
        if example.group == "ru" or contains(example.answer, ("Cyrillic",)):
            continue
        prompt = tokenizer(f"<user>{example.question[0]['content']}<|end|><assistant>").input_ids
        ids = tokenizer(f"<user>{example.question[0]['content']}<|end|><assistant>{example.answer}<|end|>").input_ids
        ids = torch.tensor([ids[:48]])
        with torch.no_grad():
            logp = model(ids).logits[0, :-1].log_softmax(-1)
        own = -logp.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        nats.append(float(own.sum()))
        counts.append(len(own))
    assert found.points[0].nat_tokens == counts
    assert found.points[0].nats == pytest.approx(nats, rel=1e-5)


def test_the_same_command_goes_on_and_repeats_nothing(base, found, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(sft, "train", fail)
    again = run(replace(base, draws=51))
    assert [p for p in again.points] == [p for p in found.points]
    with pytest.raises(StoreError, match=r"learning_rate: 0.01 -> 0.02"):
        run(replace(base, learning_rate=0.02))
    path = base.out / "runs" / "none-seed0" / "result.json"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:100])
        with pytest.raises(StoreError, match="damaged"):
            run(base)
    finally:
        path.write_bytes(whole)


def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_result(base, found, tmp_path, monkeypatch):
    """Killed behind the checkpoint of the first step, and once more while a later one was being written."""
    config = replace(base, out=tmp_path / "out", arms=("penalty",), seeds=(0,), save_steps=1)
    shutil.copytree(base.out / "runs" / "base", config.out / "runs" / "base")
    sft_train.write_json(config.out / "options.json", sft._options(config))

    class Killed(Exception):
        pass

    steps = []
    original = sft_train._bar

    def killing(bar):
        callback = original(bar)

        def on_save(args, state, control, **_):
            steps.append(state.global_step)
            raise Killed

        callback.on_save = on_save
        return callback

    monkeypatch.setattr(sft_train, "_bar", killing)
    with pytest.raises(Killed):
        run(config)
    checkpoints = config.out / "runs" / "penalty-1-seed0" / "checkpoints"
    assert steps == [1] and (checkpoints / "checkpoint-1").is_dir()
    (checkpoints / "checkpoint-2").mkdir()
    (checkpoints / "checkpoint-2" / "model.safetensors").write_bytes(b"half")
    monkeypatch.setattr(sft_train, "_bar", original)
    assert sft_train.last_checkpoint(checkpoints) == checkpoints / "checkpoint-1"
    result = run(config)
    point = next(p for p in result.points if p.arm == "penalty")
    whole = next(p for p in found.points if (p.arm, p.seed) == ("penalty", 0))
    assert point.nats == whole.nats and point.hits == whole.hits
    assert [row["loss"] for row in point.log] == [row["loss"] for row in whole.log]


def test_lora_trains_adapters_and_kl_reads_the_base(base, tmp_path, capfd):
    pytest.importorskip("peft", reason="adapters are an extra")
    config = replace(
        base, out=tmp_path / "out", arms=("random", "difference", "kl", "entropy"), seeds=(3,), steps=1, lora_rank=2,
        lora_targets=("q_proj", "v_proj"), save_models=True, alpha="zero", identify=False,
    )  # fmt: skip
    result = run(config)
    assert capfd.readouterr().out == ""  # standard output is for --json
    assert [p.arm for p in result.points] == ["base", "random", "difference", "kl", "entropy"]
    random = result.points[1]
    assert not set(random.terms["layer 0"]) & set(result.features["0"])
    assert result.points[2].terms["layer 2"] == "a direction"
    assert result.points[3].log[0]["term/kl"] == pytest.approx(0, abs=1e-6)  # adapters begin as nothing
    assert result.points[4].log[0]["term/entropy"] < 0
    assert (config.out / "runs" / "kl-0.1-seed3" / "model" / "adapter_config.json").exists()
    assert result.verdict == ("Plain SFT (the arm none) was not run, so nothing says how much it switches.",)


def test_text_and_page(base, found, tmp_path):
    text = sft_text.render(found)
    for arm in found.arms:
        assert arm.name in text
    assert all(sentence in text for sentence in found.verdict)
    page = sft_page.page(replace(found, verdict=("<script>alert(1)</script>",)))
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert page.count("<svg") >= 3 and found.page.exists()


# --- verdict ---------------------------------------------------------------------------------------------


def arm(name, weight, ratio):
    one = Interval(ratio, max(0, ratio - 0.01), ratio + 0.01)
    return sft_result.ArmResult(
        name, weight, (0,), one, (ratio,), {}, 0.0, None, 0, 100, Interval(2.0, 2.0, 2.0), (2.0,), None, 10.0, 1.0
    )


def test_the_verdict_names_what_is_not_beaten():
    arms = [arm("none", None, 0.2), arm("penalty", 1.0, 0.05), arm("token", 1.0, 0.04), arm("random", 1.0, 0.2)]
    same, less = Interval(0.01, -0.01, 0.03), Interval(-0.15, -0.17, -0.13)
    dear, free = Interval(0.1, 0.05, 0.15), Interval(0.0, -0.01, 0.01)
    compared = [
        sft_result.Comparison("penalty 1", "none", less, free, "less"),
        sft_result.Comparison("penalty 1", "token 1", same, free, "not told apart"),
        sft_result.Comparison("penalty 1", "random 1", less, dear, "less"),
    ]
    said = " ".join(sft_result.verdict(arms, compared))
    assert "switching 5.00 %, less than 20.00 % of plain SFT" in said
    assert "does not beat" in said and "token 1 (+1.00 points [-1.00, +3.00])" in said and "random 1 (" not in said
    assert "less than random 1, and its held-out loss is higher" in said
    beaten = " ".join(sft_result.verdict(arms, [compared[0], compared[2]]))
    assert "less than every control" in beaten
    zero = sft_result.verdict([replace(arm("none", None, 0.0), ratio=Interval(0, 0, 0))], [])
    assert "did not switch once" in zero[0]


# --- data and errors -------------------------------------------------------------------------------------


def test_labels_are_the_answers_of_every_turn(tiny, world):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    tokenizer.chat_template = CHATML
    messages = tuple(
        {"role": role, "content": text}
        for role, text in (("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
    )
    made = sft_data.encode(tokenizer, sft_data.Example(messages, "en"), ("Cyrillic",), 100)
    answers = [label for label in made.labels if label != -100]
    assert tokenizer.decode(answers) == "two<|end|>four<|end|>" and made.clean
    assert (
        tokenizer.decode(made.input_ids)
        == "<user>one<|end|><assistant>two<|end|><user>three<|end|><assistant>four<|end|>"
    )
    assert all(label in (-100, token) for label, token in zip(made.labels, made.input_ids, strict=True))
    cut = sft_data.encode(tokenizer, sft_data.Example(messages[:2], "en"), (), 3)
    assert cut is None
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    with pytest.raises(InputError, match="only appends"):
        sft_data.encode(tokenizer, sft_data.Example(messages, "en"), (), 100)


def test_equal_questions_fall_on_one_side(base, world):
    data = sft_data.load(base, ("Cyrillic",))
    train, held = ({e.question[0]["content"] for e in part} for part in (data.train, data.held_out))
    assert train and held and not train & held
    assert all(e.group != "ru" and not contains(e.question[0]["content"], ("Cyrillic",)) for e in data.prompts)
    assert all(not contains(t, ("Cyrillic",)) for g in ("de", "en") for t in data.texts[g]) and data.texts["ru"]


def bad(base, tmp_path, rows, **options):
    return replace(base, data=write(tmp_path / "bad.jsonl", rows), out=tmp_path / "out", **options)


def test_bad_input_is_explained(base, world, tmp_path):
    with pytest.raises(InputError, match=r"no chat template.*--chat-template"):
        run(replace(base, out=tmp_path / "none", chat_template=None))
    with pytest.raises(InputError, match=r"the group 'xx'.*de, en, ru"):
        run(replace(base, out=tmp_path / "none", target_group="xx", scripts=("Han",)))
    with pytest.raises(InputError, match="no example of a group other than 'ru'"):
        run(bad(base, tmp_path, [row for row in world.rows if row["lang"] == "ru"]))
    with pytest.raises(InputError, match=r'Row 1 of .* no usable "messages"'):
        run(bad(base, tmp_path, [{"messages": "x", "lang": "de"}]))
    with pytest.raises(InputError, match=r"Row 1 of .* has no group.*--group-field"):
        run(bad(base, tmp_path, [{"messages": world.rows[0]["messages"]}]))
    with pytest.raises(InputError, match="does not end with an answer"):
        run(bad(base, tmp_path, [{"messages": world.rows[0]["messages"][:1], "lang": "de"}]))
    switched = [row for row in world.rows if row["lang"] == "ru" or "привет" in row["messages"][1]["content"]]
    with pytest.raises(InputError, match=r"no text of the group 'de', 'en'.*--texts"):
        run(bad(base, tmp_path, switched))
    with pytest.raises(InputError, match="LAYER:FEATURE"):
        run(replace(base, out=tmp_path / "features", features=("1:3",)))
    with pytest.raises(InputError, match="different ids"):
        run(replace(base, out=tmp_path / "features", features=("2:999999",)))
    with pytest.raises(InputError, match="--steps is 0"):
        replace(base, steps=0)
    with pytest.raises(InputError, match="none twice"):
        replace(base, arms=("none", "none"))
    with pytest.raises(InputError, match="Unicode does not have"):
        run(replace(base, scripts=("Klingon",)))


def test_a_diverged_run_is_explained_and_not_kept(base, tmp_path):
    config = replace(base, out=tmp_path / "out", arms=("none",), seeds=(0,), learning_rate=1e30)
    with pytest.raises(InputError, match="none of seed 0 has diverged"):
        run(config)
    assert not (config.out / "runs" / "none-seed0" / "result.json").exists()


def test_options_of_a_refused_command_bind_nobody(base, tmp_path):
    config = replace(base, out=tmp_path / "out", arms=("none",), seeds=(0,), steps=1)
    with pytest.raises(InputError, match="LAYER:FEATURE"):
        run(replace(config, features=("1:3",)))
    assert run(replace(config, features=("2:3",))).features == {"2": (3,)}


def test_every_arm_has_a_meaning():
    assert set(sft_arms.MEANING) == {*sft_arms.ARMS, "base"}
