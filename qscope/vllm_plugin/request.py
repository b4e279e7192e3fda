"""What one request asks for, from what its sender wrote to what the worker applies."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qscope.errors import InputError
from qscope.steering import Edit, SteeringSpec, plan, positions
from qscope.steering.vectors import load_vector
from qscope.vllm_plugin.options import KEY, Options, load_sae, sae_hash


class RequestRefused(InputError, ValueError):
    """A request that cannot be served as asked. A ValueError, which vLLM's servers answer with status 400."""


@dataclass(frozen=True)
class Request:
    """A steering spec and features to read, checked; its tokens are ids and its vectors numbers."""

    edits: tuple[Edit, ...] = ()
    special: tuple[int, ...] = ()
    """The tokenizer's special ids, where an edit skips them"""
    reads: tuple[tuple[int, int], ...] = ()
    """(layer, feature)"""

    salt: str | None = None
    """What the prefix cache must tell apart: edits and the weights of their SAEs. None without edits."""

    def to_text(self) -> str:
        """JSON, for the way from the front end to engine and worker."""
        edits = SteeringSpec(self.edits).to_json()["edits"]
        plain = {"edits": edits, "special": self.special, "reads": self.reads, "salt": self.salt}
        return json.dumps(plain, sort_keys=True)

    def salted(self, options: Options) -> "Request":
        """Worked out where the request is checked, so that the engine's process needs no SAE."""
        if not self.edits:
            return self
        read = sorted({edit.layer for edit in self.edits if edit.feature is not None or edit.when is not None})
        saes = {layer: sae_hash(options.saes[layer], layer) for layer in read}
        text = json.dumps([dataclasses.replace(self, reads=(), salt=None).to_text(), saes])
        return dataclasses.replace(self, salt=f"{KEY}:{hashlib.sha256(text.encode()).hexdigest()}")


Key = tuple[Edit, int]


def directions_of(edits: Sequence[Edit]) -> list[tuple[int, Key]]:
    """(layer, what tells a direction from others) of each edit. Requests share directions, whatever tokens they choose.

    An edit that stands twice in a spec counts twice, hence the number in the key.
    """
    seen: dict[Edit, int] = {}
    found = []
    for edit in edits:
        plain = dataclasses.replace(edit, tokens="all", after=None, skip=())
        seen[plain] = seen.get(plain, -1) + 1
        found.append((edit.layer, (plain, seen[plain])))
    return found


def needs_ids(edit: Edit) -> bool:
    """Whether the edit chooses tokens by what they are."""
    return edit.after is not None or "special" in edit.skip


def column(edit: Edit, options: Options, width: int) -> plan.Column:
    """The row of the operator for one edit. Raises RequestRefused for what the plug-in cannot apply."""
    if edit.layer not in options.all_layers:
        layers = ", ".join(map(str, options.all_layers))
        raise RequestRefused(
            f"An edit of layer {edit.layer} was asked for; this engine was started to steer the layers {layers}. Name "
            f"the layer in additional_config['{KEY}'] when the engine starts."
        )
    source = options.saes.get(edit.layer)
    columns = plan.columns_of(0, edit, None if source is None else load_sae(source, edit.layer), width)
    if len(columns) > 1 or columns[0].member is not None or (columns[0].needs and columns[0].needs.mode == "exact"):
        raise RequestRefused(
            f"An edit of layer {edit.layer} depends on which features are among the k largest (activation or condition "
            "'exact'). That takes the full encode of every token in every step, which the vLLM plug-in does not do; "
            "use 'preact', or qscope.steer with a Hugging Face model."
        )
    if columns[0].needs is not None:
        raise RequestRefused(
            f"An edit of layer {edit.layer} depends on a feature of layer {columns[0].needs.layer}; the vLLM plug-in "
            "reads a condition at the edit's own layer only. qscope.steer does both."
        )
    return columns[0]


def parse(given: Any, options: Options) -> tuple[SteeringSpec, tuple[tuple[int, int], ...]]:
    """(spec, features to read) from `extra_args["qscope"]`: a name, a spec, or {"spec": ..., "read": [[15, 7]]}."""
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise RequestRefused(f"extra_args['{KEY}'] is not JSON: {error}.") from error
    if isinstance(given, str) or (isinstance(given, dict) and "edits" in given):
        given = {"spec": given}
    if not isinstance(given, dict) or not given or not set(given) <= {"spec", "read"}:
        raise RequestRefused(
            f"extra_args['{KEY}'] is {_short(given)}; accepted are the name of a spec, a spec, and an object with "
            "`spec` or `read` ([[layer, feature], ...]) or both."
        )
    spec, read = given.get("spec"), given.get("read", [])
    if isinstance(spec, str):
        if spec not in options.specs:
            known = ", ".join(options.specs) or "none"
            raise RequestRefused(f"The spec {spec!r} was asked for; this engine was started with the specs {known}.")
        spec = options.specs[spec]
    elif spec is not None:
        spec = SteeringSpec.from_json(spec)
        files = [edit.vector for edit in spec.edits if isinstance(edit.vector, str)]
        if files:
            raise RequestRefused(
                f"A request names the file {files[0]!r}. Requests may come over a network and do not choose what an "
                "engine reads: send the numbers, or name a spec that the engine was started with."
            )
    pairs = isinstance(read, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(type(x) is int for x in pair) for pair in read
    )
    if not pairs:
        raise RequestRefused(f"`read` is {_short(read)}; pairs [layer, feature] are accepted.")
    return spec or SteeringSpec(()), tuple(dict.fromkeys((pair[0], pair[1]) for pair in read))


def check(given: Any, options: Options, width: int, tokenizer: Any, ids_late: bool) -> Request:
    """The request behind `extra_args["qscope"]`. Raises RequestRefused.

    width: D. ids_late: the engine starts a step before the host knows the tokens of the last one.
    """
    try:
        return _checked(given, options, width, tokenizer, ids_late)
    except RequestRefused:
        raise
    except InputError as error:
        raise RequestRefused(str(error)) from error


def _checked(given: Any, options: Options, width: int, tokenizer: Any, ids_late: bool) -> Request:
    spec, reads = parse(given, options)
    for layer, reference in spec.saes.items():
        if layer in options.saes and reference.hash and not options.allow_mismatch:
            found = sae_hash(options.saes[layer], layer)
            if found != reference.hash:
                raise RequestRefused(
                    f"The spec was made for an SAE of layer {layer} with the hash {reference.hash[:16]}..., and this "
                    f"engine's has {found[:16]}...: its feature ids may mean other things. Start the engine with that "
                    "SAE, or with allow_mismatch."
                )
    for edit in spec.edits:
        column(edit, options, width)
        if ids_late and needs_ids(edit) and positions.parse(edit.tokens) != positions.Positions(prompt=True):
            raise RequestRefused(
                "An edit chooses generated tokens by their ids (`after`, skip special), which vLLM's asynchronous "
                "scheduling does not know in time: start the engine with async_scheduling=False, or choose prompt."
            )
    for layer, feature in reads:
        probe(layer, feature, options, width)
    edits = tuple(
        dataclasses.replace(edit, after=_id(edit.after, tokenizer), vector=_numbers(edit, width)) for edit in spec.edits
    )
    skips = any("special" in edit.skip for edit in edits)
    special = tuple(sorted(_needed(tokenizer).all_special_ids)) if skips else ()
    return Request(edits, special, reads).salted(options)


def probe(layer: int, feature: int, options: Options, width: int) -> tuple[Any, float]:
    """(W_enc row [D] float32, its bias) of a feature to read out."""
    edit = Edit(layer, feature=feature, mode="ablate")  # the rules for its layer and id are those of an edit
    made = column(edit, options, width)
    return made.reader, made.setting.reader_bias


def _numbers(edit: Edit, width: int) -> tuple[float, ...] | None:
    """A vector by its content: what a file holds may change between requests, and the prefix cache would not know."""
    return None if edit.vector is None else tuple(load_vector(edit.vector, edit.layer, width).tolist())


def _id(after: int | str | None, tokenizer: Any) -> int | None:
    if not isinstance(after, str):
        return after
    ids = _needed(tokenizer).encode(after, add_special_tokens=False)
    if len(ids) != 1:
        raise RequestRefused(f"after {after!r} was given, which is {len(ids)} tokens here; give one token.")
    return int(ids[0])


def _needed(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise RequestRefused("An edit needs the tokenizer (`after` as text, skip special), and the engine has none.")
    return tokenizer


def _short(given: Any) -> str:
    text = repr(given)
    return text if len(text) < 80 else text[:77] + "..."


@functools.lru_cache(maxsize=1024)
def received(text: str) -> Request:
    """The inverse of `Request.to_text`."""
    given = json.loads(text)
    edits = SteeringSpec.from_json({"edits": given["edits"]}).edits
    reads = tuple((layer, feature) for layer, feature in given["reads"])
    return Request(edits, tuple(given["special"]), reads, given["salt"])
