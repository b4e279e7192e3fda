"""Conversations for `qscope sft`: read, split, made into tokens with the labels of their answers."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope.errors import InputError
from qscope.post_training.switching import contains
from qscope.records import RecordCounts, read_records

if TYPE_CHECKING:
    from qscope.workflows.sft import SFTConfig

IGNORED = -100
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Example:
    """A conversation whose last message is the answer."""

    messages: tuple[dict[str, str], ...]
    group: str

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    @property
    def question(self) -> tuple[dict[str, str], ...]:
        return self.messages[:-1]


@dataclass(frozen=True)
class Encoded:
    """An example as tokens; `labels` are -100 outside the answers."""

    input_ids: list[int]
    labels: list[int]
    group: str
    clean: bool
    """Its answers are free of the target's scripts"""

    def row(self) -> dict[str, Any]:
        return {"input_ids": self.input_ids, "labels": self.labels, "group": self.group}


@dataclass(frozen=True)
class Data:
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    prompts: tuple[Example, ...]
    """Of groups other than the target, free of its scripts; their answers are not used"""
    texts: dict[str, tuple[str, ...]]
    """group -> texts from which features and thresholds are found; the groups are those of the training data"""
    prompts_left_out: int
    """Because they hold the target's script themselves"""
    broken: int
    """Rows that are no JSON"""

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(self.texts)


def load(config: "SFTConfig", scripts: Sequence[str]) -> Data:
    """Everything that `config` names, split. Raises InputError for what cannot be used."""
    counts = RecordCounts()
    examples = read_examples(Path(config.data), config.group_field, counts)
    if config.held_out is None:
        held = [e for e in examples if _share(e) < config.held_out_share]
        train = [e for e in examples if _share(e) >= config.held_out_share]
    else:
        train, held = examples, read_examples(Path(config.held_out), config.group_field, counts)
    groups = sorted({e.group for e in train})
    if config.target_group not in groups and config.texts is None:
        raise InputError(
            f"No example of {config.data} is of the group {config.target_group!r}, so nothing tells its features. The "
            f"groups are {', '.join(groups)}. Name one of them as the target group, or give --texts."
        )
    if not any(e.group != config.target_group for e in train):
        raise InputError(
            f"{config.data} has no example of a group other than {config.target_group!r}: none can switch."
        )
    unknown = sorted({e.group for e in held} - set(groups))
    if unknown:
        raise InputError(f"The held-out examples have the groups {', '.join(unknown)}, which the training data lacks.")
    asked = held if config.prompts is None else read_examples(Path(config.prompts), config.group_field, counts, True)
    prompts, left_out = _prompts(asked, config, scripts)
    kept = _some(held, config.held_out_examples)
    return Data(tuple(train), kept, prompts, _texts(config, train, scripts), left_out, counts.broken)


def read_examples(path: Path, group_field: str | None, counts: RecordCounts, questions: bool = False) -> list[Example]:
    """Rows with `messages` (role, content) and a group. `questions`: the last message may be of the user; an empty
    answer is put behind it."""
    records = read_records(path, counts)
    first = records[0].fields
    field = group_field or next((name for name in ("group", "lang") if name in first), "group")
    found = []
    for record in records:
        messages, group = record.fields.get("messages"), record.fields.get(field)
        where = f"Row {record.number + 1} of {path}"
        if not isinstance(messages, list) or not messages or not all(_is_message(m) for m in messages):
            raise InputError(
                f'{where} has no usable "messages": a list of objects with "role" ({", ".join(_ROLES)}) and "content" '
                "(text) is accepted. Mend the row or remove it."
            )
        if not isinstance(group, str) or not group:
            raise InputError(
                f"{where} has no group: a text in the field {field!r}, such as a language code, is accepted. Name the "
                "field with --group-field."
            )
        kept = tuple({"role": m["role"], "content": m["content"]} for m in messages)
        if questions and kept[-1]["role"] != "assistant":
            kept = (*kept, {"role": "assistant", "content": ""})
        if kept[-1]["role"] != "assistant" or len(kept) < 2:
            raise InputError(f"{where} does not end with an answer of the assistant to something. Mend or remove it.")
        found.append(Example(kept, group))
    return found


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in _ROLES and isinstance(message.get("content"), str)


def _share(example: Example) -> float:
    """A place from 0 to 1 by the hash of the question, so that equal questions fall on one side."""
    text = "\n".join(m["content"] for m in example.question).encode("utf-8", "replace")
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") / 2**32


def _some(examples: Sequence[Example], count: int) -> tuple[Example, ...]:
    """At most `count` of each group, by their hash."""
    taken: dict[str, int] = {}
    found = []
    for example in sorted(examples, key=lambda e: (e.group, _share(e))):
        taken[example.group] = taken.get(example.group, 0) + 1
        if taken[example.group] <= count:
            found.append(example)
    return tuple(found)


def _prompts(asked: Sequence[Example], config: "SFTConfig", scripts: Sequence[str]) -> tuple[tuple[Example, ...], int]:
    others = [e for e in asked if e.group != config.target_group]
    fair = [e for e in others if not any(contains(m["content"], scripts) for m in e.question)]
    chosen = _some(fair, config.prompts_per_group)
    if not chosen:
        raise InputError(
            f"There is no prompt to measure switching on: of {len(asked)} held-out prompts {len(others)} are of groups "
            f"other than {config.target_group!r}, and {len(fair)} of these are free of {'/'.join(scripts)}. Give "
            "--prompts, more data, or a larger --held-out-share."
        )
    return chosen, len(others) - len(fair)


def _texts(config: "SFTConfig", train: Sequence[Example], scripts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Texts of --texts, else answers of the training data: of other groups those that are free of the scripts."""
    groups = sorted({e.group for e in train} | {config.target_group})
    found: dict[str, list[str]] = {group: [] for group in groups}
    if config.texts is not None:
        path = Path(config.texts)
        for record in read_records(path):
            text, group = record.fields.get("text"), record.fields.get("group", record.fields.get("lang"))
            if not isinstance(text, str) or not isinstance(group, str):
                raise InputError(f'Row {record.number + 1} of {path} lacks "text" or "group" (or "lang"), both texts.')
            if group in found:
                found[group].append(text)
    else:
        for example in train:
            if example.answer.strip() and (
                example.group == config.target_group or not contains(example.answer, scripts)
            ):
                found[example.group].append(example.answer)
    empty = [group for group, texts in found.items() if not any(text.strip() for text in texts)]
    if empty:
        raise InputError(
            f"There is no text of the group {', '.join(map(repr, empty))} to find features and thresholds with. Give "
            "some for every group of the data (--texts, rows with text and group)."
        )
    dice = random.Random(0)
    return {g: tuple(dice.sample(t, min(config.texts_per_group, len(t)))) for g, t in found.items()}


# --- tokens --------------------------------------------------------------------------------------------------


def check_template(tokenizer: Any, name: str, template: Path | None) -> None:
    """Gives the tokenizer the template of the file, and refuses one that has none. InputError."""
    if template is not None:
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--chat-template {template} cannot be read: {error}. Give a Jinja file.") from error
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"The tokenizer of {name} has no chat template, so it is not known how a conversation is written for this "
            "model: base models often lack one. Give a Jinja file with --chat-template (ChatML is a common choice), or "
            "take the instruct version of the model."
        )


def question_ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Tokens up to where the answer begins."""
    return _template(tokenizer, messages, True)


def encode(tokenizer: Any, example: Example, scripts: Sequence[str], max_length: int) -> Encoded | None:
    """The example as tokens, cut to `max_length`; None where nothing of an answer is left.

    Every answer of the conversation has labels: what the template writes behind the prompt for it. Raises InputError
    for a template that writes the prompt otherwise once the answer is there.
    """
    ids: list[int] = []
    labels: list[int] = []
    for place, message in enumerate(example.messages):
        if message["role"] != "assistant" or place == 0:
            continue
        begin = _template(tokenizer, example.messages[:place], True)
        whole = _template(tokenizer, example.messages[: place + 1], False)
        if whole[: len(begin)] != begin or begin[: len(ids)] != ids:
            raise InputError(
                "The chat template writes a prompt otherwise once its answer follows, so answers cannot be told from "
                "prompts. Give a template that only appends, with --chat-template."
            )
        labels += [IGNORED] * (len(begin) - len(ids)) + whole[len(begin) :]
        ids = whole
    ids, labels = ids[:max_length], labels[:max_length]
    if all(label == IGNORED for label in labels[1:]):
        return None
    clean = not any(contains(m["content"], scripts) for m in example.messages if m["role"] == "assistant")
    return Encoded(ids, labels, example.group, clean)


def _template(tokenizer: Any, messages: Sequence[dict[str, str]], prompt: bool) -> list[int]:
    import jinja2

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except (jinja2.TemplateError, ValueError) as error:
        raise InputError(
            f"The chat template refuses a conversation: {error}. Mend the data or the template."
        ) from error
    return list(tokenizer(text, add_special_tokens=False).input_ids)
