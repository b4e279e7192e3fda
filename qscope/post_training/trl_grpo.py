"""TRL's GRPO trainer (DAPO loss) with one rare negative in every group. Needs trl 1.16; nothing else imports this.

Qwen-Scope section 8: for each prompt G - 1 responses are sampled as always, the last one with steering towards endless
repetition, and the reward punishes it. What the paper leaves open is settled here, and can be chosen:

importance ratio   by default the steered response counts as the policy's own: its old log-probabilities are those of
                   the model without steering, so the ratio is 1 at the first inner step. `old_logps="behaviour"` takes
                   those of the steered model that wrote it: the ratio is then far below 1 where steering did something.
weight in length   the DAPO loss divides one sum over all tokens by their number, so a loop that runs to the largest
                   length would count more than the rest of the group. Its tokens are weighted, in the sum and in the
                   number, to count at most `length_cap` times as many as a normal response of its group has on average.
group statistics   mean and standard deviation are those of all G rewards, as in the paper.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

from qscope.errors import InputError
from qscope.post_training.negatives import LoopNegative, SteeredNegative
from qscope.post_training.rewards import checked
from qscope.steering import SteeringSpec, steer

OldLogps = Literal["unsteered", "behaviour"]


class SteeredGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose groups end in a negative; without one, and in evaluation, TRL's own to the bit.

    Args:
        negative: what makes it; None: plain DAPO.
        old_logps, length_cap: see the module. length_cap None: no cap.
        others: as GRPOTrainer takes them. Reward functions are made to refuse NaN (`rewards.checked`).

    The column `steered` of the logged completions says which ones they are; the metrics steered/reward,
    steered/length and steered/weight are means over them.

    Raises InputError for settings under which rows could not be told apart: vLLM, continuous batching, tools, a
    rollout function, a loss other than dapo, fewer than two generations, cut
    responses left out of the loss; and for "behaviour" of a loop, which no
    policy wrote.
    """

    def __init__(
        self,
        *args: Any,
        negative: SteeredNegative | LoopNegative | None = None,
        old_logps: OldLogps = "unsteered",
        length_cap: float | None = 1.0,
        **kwargs: Any,
    ) -> None:
        if "reward_funcs" in kwargs or len(args) > 1:
            given = args[1] if len(args) > 1 else kwargs["reward_funcs"]
            functions = [checked(f) for f in given] if isinstance(given, list | tuple) else checked(given)
            if len(args) > 1:
                args = (args[0], functions, *args[2:])
            else:
                kwargs["reward_funcs"] = functions
        super().__init__(*args, **kwargs)
        self.negative, self.old_logps, self.length_cap = negative, old_logps, length_cap
        self._group, self._largest = int(self.num_generations or 0), int(self.max_completion_length or 0)
        self._specs: list[SteeringSpec | None] = []
        self._negatives: list[bool] = []
        if negative is not None:
            self._check()

    def _check(self) -> None:
        wrong = [
            name
            for name, given in (
                ("use_vllm", self.use_vllm),
                ("use_transformers_continuous_batching", self.use_transformers_continuous_batching),
                ("tools", bool(self.tools)),
                ("a rollout function", self.rollout_func is not None),
                ("FSDP or DeepSpeed", self.is_fsdp_enabled or self.is_deepspeed_enabled),
            )
            if given
        ]
        if wrong:
            raise InputError(
                f"A rare negative was asked for together with {' and '.join(wrong)}; the rows to steer are known only "
                "where transformers' own generate makes all of them at once, in one process or under DDP."
            )
        if self.loss_type != "dapo" or self._group < 2:
            raise InputError(
                f"loss_type {self.loss_type!r} with {self._group} generations was given; a rare negative "
                "needs loss_type 'dapo', whose sum over tokens its weight is defined for, and at least 2 generations."
            )
        if self.mask_truncated_completions:
            raise InputError(
                "mask_truncated_completions was given, which takes responses that were cut out of the loss: the rare "
                "negatives are such responses. Leave it out."
            )
        if self.old_logps not in ("unsteered", "behaviour") or (self.length_cap is not None and self.length_cap <= 0):
            raise InputError(
                f"old_logps {self.old_logps!r} and length_cap {self.length_cap} were given; unsteered or behaviour, "
                "and a number above 0 or None, are accepted."
            )
        if self.old_logps == "behaviour" and isinstance(self.negative, LoopNegative):
            raise InputError("old_logps 'behaviour' was given with a loop, which no policy wrote; take 'unsteered'.")

    # --- generation --------------------------------------------------------------------------------------

    def _last_of_group(self, count: int) -> list[bool]:
        """Of the local rows: TRL gives the G rollouts of a prompt in a row, cut into equal parts for the processes."""
        first = int(self.accelerator.process_index) * count
        return [(first + i) % self._group == self._group - 1 for i in range(count)]

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        live = self.negative is not None and self.model.training
        self._negatives = self._last_of_group(len(prompt_ids)) if live else [False] * len(prompt_ids)
        self._specs = [None] * len(prompt_ids)
        if live and isinstance(self.negative, SteeredNegative):
            self._specs = [self.negative.draw() if last else None for last in self._negatives]
        if not any(spec is not None for spec in self._specs):
            completion_ids, logps = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        else:
            with self._steering(self._specs):
                completion_ids, logps = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if live and isinstance(self.negative, LoopNegative):
            completion_ids = [
                self.negative.loop(ids, self._largest, self.eos_token_ids) if last else ids
                for ids, last in zip(completion_ids, self._negatives, strict=True)
            ]
        if self.negative is not None:
            self._log_completion_extra("steered", list(self._negatives))
        return completion_ids, logps

    def _steering(self, specs: Sequence[SteeringSpec | None]) -> Any:
        assert isinstance(self.negative, SteeredNegative)
        model = self.accelerator.unwrap_model(self.model)
        return steer(model, specs, saes=self.negative.saes, tokenizer=self.processing_class, record=False)

    # --- rewards, advantages, masks ----------------------------------------------------------------------

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        scores: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        for i, (function, name) in enumerate(zip(self.reward_funcs, self.reward_func_names, strict=True)):
            if isinstance(function, torch.nn.Module) and not bool(scores[:, i].isfinite().all()):
                raise InputError(
                    f"The reward model {name} gave a number that is not finite. TRL would take NaN for a reward that "
                    "has nothing to say; mend the model, or run it in float32."
                )
        if self.negative is not None and self.model.training:
            weights = self.reward_weights.to(scores.device)
            whole = (scores * weights).nansum(dim=1)[self._group - 1 :: self._group]
            self._metrics["train"]["steered/reward"].append(float(whole.mean()))
        return scores

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.negative is None or not self.model.training:
            return output
        last = torch.tensor(self._negatives, device=output["completion_mask"].device)
        weight = self._weights(output["completion_mask"], last)
        # The clipped objective is linear in a positive factor of the advantage, so this weighs the tokens of the loss.
        output["advantages"] = output["advantages"] * weight
        counted = (output["completion_mask"].sum(dim=1) * weight).sum()
        output["num_items_in_batch"] = self.accelerator.gather(counted).sum()
        if self.old_logps == "behaviour":
            output["old_per_token_logps"] = self._behaviour_logps(output)
        output["steered"] = last
        return output

    def _weights(self, mask: Tensor, last: Tensor) -> Tensor:
        """[B] float32, of the local rows: 1, and at most 1 for the negatives. mask: [B, T]."""
        lengths = self.accelerator.gather(mask.sum(dim=1)).float().view(-1, self._group)
        normal = lengths[:, :-1].mean(dim=1)
        weights = torch.ones_like(lengths)
        if self.length_cap is not None:
            weights[:, -1] = (self.length_cap * normal / lengths[:, -1].clamp(min=1)).clamp(max=1.0)
        self._metrics["train"]["steered/length"].append(float(lengths[:, -1].mean()))
        self._metrics["train"]["steered/weight"].append(float(weights[:, -1].mean()))
        first = int(self.accelerator.process_index) * len(last)
        return weights.view(-1)[first : first + len(last)]

    def _behaviour_logps(self, output: dict[str, Any]) -> Tensor:
        """[B, T]: log-probabilities of the responses under what wrote each of them."""
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        size = self.args.per_device_train_batch_size
        parts = []
        for start in range(0, len(ids), size):
            rows = slice(start, start + size)
            specs = self._specs[rows]
            steering = self._steering(specs) if any(spec is not None for spec in specs) else None
            if steering is not None:
                steering.prompt_length = output["prompt_ids"].shape[1]
                steering.attach()
            try:
                with torch.no_grad():
                    keep = output["completion_ids"].shape[1]
                    logps, *_ = self._get_per_token_logps_and_entropies(self.model, ids[rows], mask[rows], keep)
            finally:
                if steering is not None:
                    steering.detach()
            parts.append(logps)
        return torch.cat(parts)
