"""What a loss is made of, as records: its settings, its inputs, and its answers for a slice and for each token."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from rlif_lightning.functional.surrogates import Surrogate, capped_weight, sequence_ratio, token_ratio

Loss = Literal["grpo", "dapo", "bnpo", "dr_grpo", "gspo", "cispo"]
KLEstimator = Literal["k2", "k3"]

# What is averaged over: each sequence's token mean, then sequences; all tokens; a constant length per sequence.
Normalization = Literal["sequence", "token", "constant"]

# A loss is a surrogate and a normalisation: grpo (arXiv 2402.03300); dapo and bnpo (arXiv 2503.14476; two names of
# one thing once the denominator is the window's); dr_grpo (arXiv 2503.20783); gspo (arXiv 2507.18071); cispo
# (arXiv 2506.13585).
LOSSES: dict[Loss, tuple[Callable[..., Surrogate], Normalization]] = {
    "grpo": (token_ratio, "sequence"),
    "dapo": (token_ratio, "token"),
    "bnpo": (token_ratio, "token"),
    "dr_grpo": (token_ratio, "constant"),
    "gspo": (sequence_ratio, "sequence"),
    "cispo": (capped_weight, "token"),
}


@dataclass(frozen=True)
class LossSettings:
    """Which loss it is.

    Raises:
        ValueError: A name is unknown, or a number is negative or not finite.
    """

    name: Loss = "grpo"  # surrogate and weights of the tokens
    clip_low: float = 0.2  # the ratio is clipped below at 1 - clip_low; cispo has no lower bound
    clip_high: float = 0.2  # the ratio is clipped above at 1 + clip_high
    kl_coefficient: float = 0.0  # weight of the KL estimate; 0 with a reference only reports the KL
    kl_estimator: KLEstimator = "k3"  # see losses.kl_estimate
    entropy_coefficient: float | None = None  # weight of the bonus; 0 only reports the entropy; None: nobody asks

    def __post_init__(self) -> None:
        for what, value, known in (("loss", self.name, Loss), ("kl_estimator", self.kl_estimator, KLEstimator)):
            if value not in get_args(known):
                expected = f"one of {', '.join(get_args(known))}"
                raise ValueError(f"{what} is unknown\n  got: {value!r}\n  expected: {expected}")
        for what in ("clip_low", "clip_high", "kl_coefficient", "entropy_coefficient"):
            if not 0 <= (getattr(self, what) or 0) < math.inf:
                raise ValueError(f"{what} is out of range\n  got: {getattr(self, what)}\n  expected: 0 or more")

    @property
    def surrogate(self) -> Callable[..., Surrogate]:
        """One of :mod:`rlif_lightning.functional.surrogates`."""
        return LOSSES[self.name][0]

    @property
    def normalization(self) -> Normalization:
        """What is averaged over."""
        return LOSSES[self.name][1]

    @property
    def is_separable(self) -> bool:
        """Whether a token's part of the loss needs its own log-probability and no other quantity with gradient.

        So it is, but for gspo, whose ratio is a row's, and where the entropy is asked for.
        """
        return self.surrogate is not sequence_ratio and self.entropy_coefficient is None


@dataclass(frozen=True)
class LossInputs:
    """What the loss reads of the completions; no gradient goes there. A row is never split between slices."""

    advantages: Tensor  # [N]
    mask: Tensor  # [N, T] bool, the tokens that enter the loss; elsewhere anything may stand, nan and -inf included
    old_logprob: Tensor | None = None  # [N, T] of the policy that sampled. None: on policy, the detached
    # log-probabilities of this pass; the ratio is exactly 1 and the gradient that of REINFORCE
    reference_logprob: Tensor | None = None  # [N, T] of the reference of the KL term
    surrogate_mask: Tensor | None = None  # [N, T] bool, the tokens that learn from the advantage; None: all in the
    # mask. KL, bonus and denominator stay with all
    importance: Tensor | None = None  # [N, T] w, how much likelier a token was under the policy that is called old
    # than under the engine that drew it, capped; None: 1. It corrects the surrogate alone (Yao et al. 2025)

    def by_token(self) -> "LossInputs":
        """The same with the advantage of each token's row, [N, T]."""
        return replace(self, advantages=self.advantages[:, None].expand_as(self.mask))

    def map(self, function: Callable[[Tensor], Tensor]) -> "LossInputs":
        """The same with the function applied to each tensor."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return LossInputs(**{name: function(x) for name, x in given.items() if x is not None})

    def check_shapes(self, logprob: Tensor, **per_token: Tensor | None) -> None:
        """Refuse what broadcasting would accept in silence: shapes other than that of logprob [N, T]."""
        if logprob.ndim != 2:
            raise ValueError(f"logprob has a wrong shape\n  got: {list(logprob.shape)}\n  expected: [N, T]")
        given = {**{f.name: getattr(self, f.name) for f in fields(self)}, **per_token}
        for name, x in given.items():
            shape = logprob.shape[:1] if name == "advantages" else logprob.shape
            if x is not None and x.shape != shape:
                raise ValueError(f"{name} has a wrong shape\n  got: {list(x.shape)}\n  expected: {list(shape)}")


class PolicyLoss(NamedTuple):
    """The loss of one slice, and what to log: sums over its tokens, so a window's mean is sum / sum.

    Of :func:`~rlif_lightning.functional.losses.token_loss`: the same of each token [...], 0 outside the mask.
    """

    loss: Tensor  # [] divided by the denominator, with gradient; of a token before weights
    ratio: Tensor  # [] sum of pi / pi_old; for gspo each token counts its sequence's
    clipped: Tensor  # [] tokens whose gradient the clip cuts, or for cispo lowers
    kl: Tensor  # [] sum of the estimate of KL(pi || reference) in nats, 0 without a reference
    entropy: Tensor  # [] sum of the entropies in nats, 0 where none were given
    tokens: Tensor  # [] tokens in the mask
