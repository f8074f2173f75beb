"""CaOPD: on-policy distillation that stays honest about what it knows (arXiv 2604.16830).

On-policy distillation (OPD) scores a student's own completions token by token with a teacher: the
same network, shown privileged context z. The teacher is sure because it has seen z. The student,
which sees no z once it is deployed, learns the same certainty. Algorithm 1 repairs that with one
change, step 3, and the order of this file is its order:

    1. rollout                 sample K completions y = (a, c) of each prompt x, and verify them:
                               a is the answer, c the confidence that the completion states
    2. empirical confidence    mu_hat(x), the share of correct ones among them
    3. target replacement      c becomes mu_hat, in the completion and in the teacher's context
    4. distillation loss       KL(student || teacher) at every token of the completion (by default
                               KL(teacher || student) at those of a replaced confidence)

METHODS, after step 4, has a row for each method: OPD leaves out steps 2 and 3, GRPO has a reward in
place of a teacher. `train` is the loop, and a first reading ends with it. Behind it stand the
teacher, the supervised stage that makes the base model, evaluation and the command line, which
pipeline.py carries out; the metrics are in metrics.py, AdamW in optim.py, logs and checkpoints in
stage.py. Each batch of rollouts is used for one update. Under torchrun several processes divide its
prompts (ranks.py).

    python caopd.py                                   the embedded world, from nothing to the table
    python caopd.py --model DIR --task arithmetic     the same on a real model
    python caopd.py --explain "47*8"                  one question, step by step through it
    python caopd.py --ask "47*8" "12+34"              the models that were made, side by side
    python caopd.py --help
    torchrun --nproc-per-node 8 caopd.py ...          on 8 GPUs
"""

import argparse
import dataclasses
import math
import os
import signal
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, pstdev, stdev

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import data
import ranks
from data import Example, Task, Tokenizer, Wording
from files import BadInput, Unbroken, parse_json
from metrics import VALUES, bootstrap, calibration, every_readout, expected, reliability
from model import NotFinite, SharedPrefix, Transformer, generate
from optim import AdamW, store, warmup_cosine, warmup_stable_decay
from stage import REMEDY, Stage

# ------------------------------------------------------------------- Algorithm 1, step 1: rollout


@dataclass
class Rollout:
    """One sampled completion y = (a, c)."""

    ids: list[int]  # with the end token, unless it was truncated
    text: str
    truncated: bool  # cut off at max_new_tokens: wrong, states nothing, has no I_c in the loss
    correct: bool  # R(x, a)
    confidence: float | None  # val(c); None where none can be parsed


@dataclass
class Group:
    """A prompt x and its K rollouts."""

    example: Example
    prompt: list[int]  # token ids of x
    rollouts: list[Rollout]
    reference: str = ""  # the teacher's own completion, for self-consistency


SAMPLED = 4  # Sampling holds so many times the tokens of training at once: it has no gradient.


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    micro_tokens: int = 16384  # computed at once in training, and SAMPLED times as many here


def rollout(student: Transformer, tokenizer: Tokenizer, examples: list[Example], wording: Wording,
            num_rollouts: int, sampling: Sampling, generator: torch.Generator) -> list[Group]:
    """Step 1 of Algorithm 1: samples completions y_k ~ π_θ(·|x) of each prompt and verifies them.

    Returns one Group per example, in their order, each with `num_rollouts` rollouts. The one check
    R(x, a) is `data.verify`; a truncated completion counts as wrong.
    """
    prompts = [tokenizer.chat(data.student_messages(example, wording)) for example in examples]
    sampled = sample_completions(student, tokenizer, prompts, num_rollouts, sampling, generator)
    groups = []
    for example, prompt, completions in zip(examples, prompts, sampled):
        rollouts = []
        for ids in completions:
            text, truncated = tokenizer.decode(ids), ids[-1] not in tokenizer.eos_ids
            correct = not truncated and data.verify(example, text)
            confidence = None if truncated else data.parse_confidence(text)
            rollouts.append(Rollout(ids, text, truncated, correct, confidence))
        groups.append(Group(example, prompt, rollouts))
    return groups


def sample_completions(model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]],
                       num_samples: int, sampling: Sampling,
                       generator: torch.Generator) -> list[list[list[int]]]:
    """`num_samples` completions of each prompt, in as few batches as memory allows."""
    model, completions = model.for_inference(), []
    costs = [len(prompt) + num_samples * sampling.max_new_tokens for prompt in prompts]
    for batch in tqdm(micro_batches(costs, SAMPLED * sampling.micro_tokens), desc="sampling",
                      unit="batch", dynamic_ncols=True, leave=False, delay=5,
                      disable=not ranks.first()):
        flat = generate(model, [prompts[i] for i in batch], sampling.max_new_tokens,
                        sampling.temperature, top_p=sampling.top_p, eos_ids=tokenizer.eos_ids,
                        num_samples=num_samples, generator=generator)
        completions += [flat[i:i + num_samples] for i in range(0, len(flat), num_samples)]
    return completions


# ------------------------------------------------------------------ step 2: empirical confidence


def mu_hat(group: Group) -> float:
    """μ̂(x) = (1/K) Σ_k R(x, a_k) (Eq. 6)."""
    return fmean(rollout.correct for rollout in group.rollouts)


# -------------------------------------------------------------------- step 3: target replacement


@dataclass(frozen=True)
class Completion:
    """What is learned of a rollout: y, or ỹ where the confidence was replaced."""

    ids: tuple[int, ...]
    answer_length: int  # the tokens before it are learned as I_a, the others as I_c
    truncated: bool = False  # then it has no I_c
    advantage: float = 0.0  # for the policy gradient


@dataclass
class Target:
    """What is learned from one prompt: the student reads x, the teacher (x, z) or (x, z̃).

    Both score the same completions, which share the keys and values of the prompt. Rollouts that
    came out the same are one completion, which is computed once and weighs as much as all of them.
    """

    prompt: list[int]
    teacher_prompt: list[int]  # empty for a method without a teacher
    completions: dict[Completion, int]  # and how many rollouts each of them stands for

    @property
    def sequences(self) -> list[list[int]]:
        return [list(y.ids) for y in self.completions]

    @property
    def num_tokens(self) -> int:
        longest = max(len(self.prompt), len(self.teacher_prompt))
        return longest + sum(len(y.ids) for y in self.completions)


REPLACEMENTS = "completion", "demonstration", "instruction"


def make_targets(group: Group, confidence: float | list[float] | None, advantages: list[float],
                 tokenizer: Tokenizer, wording: Wording, context: str | None,
                 places: Collection[str] = REPLACEMENTS,
                 end_in_answer: bool = False) -> list[Target]:
    """Step 3 of Algorithm 1: ỹ = (a, μ̂) for the student, and z̃, which states μ̂, for the teacher.

    confidence: μ̂, or a value for each rollout, or None, which leaves completions as they were
    sampled (OPD). A truncated completion stays as it is. Any other that states no confidence is
    given one, so that the sum over I_c teaches it to state one, too.
    advantages: one for each rollout, for the policy gradient; zeros for a method without a reward.
    context: "demo", "solution", or None for a method without a teacher.
    places: where μ̂ is stated, of REPLACEMENTS: in the completion, in the demonstration that z
    shows, in z's instruction. The paper does all three.
    end_in_answer: whether the first token of a replaced c is learned as a part of the answer (see
    `Method.end_in_answer`).
    Returns a Target for each teacher context. Rollouts that have none are left out: with
    `solution`, those without another correct rollout.
    """
    values = confidence if isinstance(confidence, list) else [confidence] * len(group.rollouts)
    completions = []
    for rollout, value, advantage in zip(group.rollouts, values, advantages):
        if value is None or rollout.truncated or "completion" not in places:
            ids, n = rollout.ids, data.split_completion(tokenizer, rollout.ids)[0]
        else:
            ids, n = data.replace_confidence(tokenizer, rollout.ids, value)
            n += end_in_answer
        completions.append(Completion(tuple(ids), n, rollout.truncated, advantage))

    if context is None:
        return [Target(group.prompt, [], Counter(completions))]

    # A context states one value, even where each rollout has its own: the mean over all K, which
    # is μ̂ for the leave-one-out values, too.
    told = None if confidence is None else fmean(values)
    shown = told if "demonstration" in places else None
    instructed = told if "instruction" in places else None
    targets = []
    for demo, readers in demonstrations(group, context, shown, tokenizer):
        messages = data.teacher_messages(group.example, wording, demo, instructed,
                                         solution=context == "solution")
        targets.append(Target(group.prompt, tokenizer.chat(messages),
                              Counter(completions[k] for k in readers)))
    return targets


def demonstrations(group: Group, context: str, shown: float | None,
                   tokenizer: Tokenizer) -> list[tuple[str, Sequence[int]]]:
    """Pairs of a text that z demonstrates, and the rollouts (indices) whose teacher reads it.

    shown: the confidence to state in it. None states 1.00 in a demonstration, as the released code
    has it for tool use, and leaves a solution's confidence as it was sampled.
    """
    if context == "demo":
        demo = data.with_confidence(group.example.demo, 1.0 if shown is None else shown)
        return [(demo, range(len(group.rollouts)))]
    found = []
    for k, readers in solutions(group):
        solution = group.rollouts[k]
        text = solution.text if shown is None else tokenizer.decode(
            data.replace_confidence(tokenizer, solution.ids, shown)[0])
        found.append((text, readers))
    return found


def solutions(group: Group) -> list[tuple[int, list[int]]]:
    """SDPO's privileged context: (a correct rollout, the rollouts whose teacher is shown it).

    The first correct rollout serves all others, and the second one serves the first: no rollout is
    shown itself, though short right answers often have the same text. A lone success therefore has
    no context, and a prompt without a correct rollout has none at all.
    """
    right = [k for k, rollout in enumerate(group.rollouts) if rollout.correct]
    found = []
    if right and len(group.rollouts) > 1:
        found.append((right[0], [k for k in range(len(group.rollouts)) if k != right[0]]))
    if len(right) > 1:
        found.append((right[1], [right[0]]))
    return found


# --------------------------------------------------------------------- step 4: distillation loss

# A token loss takes student logits [M, V], teacher logits [M, V], token ids [M] and advantages [M],
# and gives a loss for each token, [M]. One that needs fewer of them ignores the rest. Divergences
# are in nats. Of sampled_kl, vopd and policy_gradient only the gradient has a meaning, not the
# value.
TokenLoss = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]


def log_probs(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """log π_θ and log π_T over the vocabulary, float32 [M, V]."""
    return student_logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)


def kl(student_logits: Tensor, teacher_logits: Tensor, *_) -> Tensor:
    """Reverse KL(π_θ‖π_T) = Σ_v π_θ(v) (log π_θ(v) − log π_T(v)), the term of Eq. 2."""
    log_p, log_q = log_probs(student_logits, teacher_logits)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, *_) -> Tensor:
    """Forward KL(π_T‖π_θ) = Σ_v π_T(v) (log π_T(v) − log π_θ(v)), the released code's default."""
    log_p, log_q = log_probs(student_logits, teacher_logits)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, *_) -> Tensor:
    """½ KL(π_θ‖m) + ½ KL(π_T‖m), with m the mean of the two distributions."""
    log_p, log_q = log_probs(student_logits, teacher_logits)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)


def log_prob(logits: Tensor, tokens: Tensor) -> Tensor:
    """log π(y_t) of the given tokens, float32 [M]."""
    return -cross_entropy(logits.float(), tokens, reduction="none")


def target_cross_entropy(student_logits: Tensor, teacher_logits: Tensor | None, tokens: Tensor,
                         *_) -> Tensor:
    """−log π_θ(ỹ_t): cross-entropy on the target's token, the forward KL from a point mass on it.

    Not in the paper. The token to state, that of μ̂, is known, so that it needs no teacher.
    """
    return -log_prob(student_logits, tokens)


DIVERGENCES = {"reverse": kl, "forward": forward_kl, "jsd": jensen_shannon}


def loss_weights(targets: list[Target], skip_tokens: int) -> tuple[Tensor, Tensor]:
    """I_a and I_c of Eq. 7: (answer weights, confidence weights), int64 [M] over completion tokens.

    A weight is how many equal rollouts the token stands for, and 0 where it is not in the sum. A
    truncated completion has only an I_a.
    """
    answer, confidence = [], []
    for target in targets:
        for y, count in target.completions.items():
            for t in range(len(y.ids)):
                in_answer, learned = t < y.answer_length, t >= skip_tokens
                answer.append(count * (learned and in_answer))
                confidence.append(count * (learned and not in_answer and not y.truncated))
    return torch.tensor(answer), torch.tensor(confidence)


def eq7(student_logits: Tensor, teacher_logits: Tensor | None, tokens: Tensor, advantages: Tensor,
        is_answer: Tensor, answer_loss: TokenLoss, confidence_loss: TokenLoss) -> Tensor:
    """The terms of Eq. 7, [M]: answer_loss at tokens of I_a, confidence_loss at those of I_c."""
    inputs = student_logits, teacher_logits, tokens, advantages
    if answer_loss is confidence_loss:
        return answer_loss(*inputs)
    loss = student_logits.new_zeros(len(tokens), dtype=torch.float32)
    for rows, token_loss in ((is_answer, answer_loss), (~is_answer, confidence_loss)):
        loss[rows] = token_loss(*(None if x is None else x[rows] for x in inputs))
    return loss


def step_gradient(student: Transformer, teacher: Transformer | None, targets: list[Target],
                  answer_loss: TokenLoss, confidence_loss: TokenLoss, skip_tokens: int,
                  micro_tokens: int) -> tuple[np.ndarray, float]:
    """Step 4 of Algorithm 1 for all targets. Each rank takes its share, `micro_tokens` at a time.

    Eq. 2 sums over tokens, and we divide by the number of tokens in the step, so that all tokens of
    a step weigh the same. AdamW is nearly invariant to that scale, gradient clipping is not.
    Returns the losses over I_a and over I_c, [2], and the share of I_c that the teacher copies, NaN
    where there is no I_c.
    """
    on_answer, on_confidence = (int(w.sum()) for w in loss_weights(targets, skip_tokens))
    num_tokens = max(1, on_answer + on_confidence)
    sums = np.zeros(3)  # loss over I_a, loss over I_c, tokens of I_c that the teacher copies
    for batch in own_batches([target.num_tokens for target in targets], micro_tokens):
        sums += accumulate_gradient(
            student, teacher, [targets[i] for i in batch] or [NOTHING_TO_LEARN], answer_loss,
            confidence_loss, skip_tokens, 1 / num_tokens)
    sums = ranks.total(sums)
    return sums[:2] / num_tokens, sums[2] / on_confidence if on_confidence else math.nan


def accumulate_gradient(student: Transformer, teacher: Transformer | None, targets: list[Target],
                        answer_loss: TokenLoss, confidence_loss: TokenLoss, skip_tokens: int,
                        scale: float) -> tuple[float, float, int]:
    """Eq. 7: adds scale · ∇(Σ_{I_a} answer_loss + Σ_{I_c} confidence_loss) to the gradients.

    Returns the two sums, over I_a (capability cloning) and over I_c (calibration), in nats, and on
    how many tokens of I_c the teacher's likeliest token is the target's.
    No gradient flows through the sampling of y (a semi-gradient), as in every released trainer.
    Each prompt is computed once for its completions, which have M tokens, M' of them in a sum.
    """
    completions, device = [target.sequences for target in targets], student.device
    on_answer, on_confidence = (w.to(device) for w in loss_weights(targets, skip_tokens))
    counted = on_answer + on_confidence > 0  # [M]
    weights = (on_answer + on_confidence)[counted]  # [M']
    is_answer = on_answer[counted] > 0  # [M']
    advantages = torch.tensor([y.advantage for target in targets for y in target.completions
                               for _ in y.ids], device=device)[counted]  # [M']
    if teacher is not None:
        with torch.no_grad():
            shared = SharedPrefix([t.teacher_prompt for t in targets], completions, device)
            teacher_hidden = hidden_states(teacher, shared, counted)  # [M', D]
    shared = SharedPrefix([t.prompt for t in targets], completions, device)
    hidden = hidden_states(student, shared, counted)  # [M', D]
    tokens = shared.tokens[counted]  # [M']
    copied = torch.zeros_like(is_answer)  # [M']

    def losses_of(rows: slice, hidden: Tensor) -> Tensor:
        teacher_logits = None
        if teacher is not None:
            with torch.no_grad():
                teacher_logits = teacher.logits(teacher_hidden[rows])
            copied[rows] = teacher_logits.argmax(-1) == tokens[rows]
        return weights[rows] * eq7(student.logits(hidden), teacher_logits, tokens[rows],
                                   advantages[rows], is_answer[rows], answer_loss, confidence_loss)

    losses = backward_in_chunks(losses_of, hidden, rows_at_once(student), scale)  # [M']
    return (losses[is_answer].sum().item(), losses[~is_answer].sum().item(),
            weights[copied & ~is_answer].sum().item())


def hidden_states(model: Transformer, shared: SharedPrefix, counted: Tensor) -> Tensor:
    """[M', D]: the hidden states from which the counted completion tokens are predicted."""
    return model.hidden(shared.input_ids, shared.positions, shared)[shared.predicts[counted]]


LOGITS_AT_ONCE = 2 ** 24  # 64 MiB in float32


def rows_at_once(model: Transformer) -> int:
    return max(1, LOGITS_AT_ONCE // model.config.vocab_size)


def backward_in_chunks(losses_of: Callable[[slice, Tensor], Tensor], hidden: Tensor, chunk: int,
                       scale: float) -> Tensor:
    """Adds scale · ∇ Σ losses to the gradients; returns the losses of all rows of hidden [M', D].

    The logits of all tokens, [M', V], would be what runs a GPU out of memory. So they exist for
    `chunk` rows at a time, which are differentiated down to their hidden states before the next
    ones are made, and the layers below are differentiated once, for all rows together.
    losses_of: (rows, their hidden states) -> their losses.
    """
    losses, gradients = [], []
    # One chunk even of no rows: the head then has a gradient on every rank, and the ranks sum them.
    for start in range(0, max(1, len(hidden)), chunk):
        rows = slice(start, start + chunk)
        h = hidden[rows].detach().requires_grad_()  # The chunk's own gradient stops here.
        loss = losses_of(rows, h)
        (scale * loss.sum()).backward()
        losses.append(loss.detach())
        gradients.append(h.grad)
    hidden.backward(torch.cat(gradients))
    return torch.cat(losses)


# ------------------------------------- what other methods need (and a reader of Algorithm 1 skips)


def sampled_kl(student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor, *_) -> Tensor:
    """Eq. 2 from the sampled token alone: −r_t log π_θ(y_t), r_t = log π_T(y_t) − log π_θ(y_t).

    r_t is detached. The mean of the gradient over y_t ~ π_θ is the gradient of the reverse KL.
    """
    log_p, log_q = log_prob(student_logits, tokens), log_prob(teacher_logits, tokens)
    return -(log_q - log_p).detach() * log_p


def vopd(student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor, *_) -> Tensor:
    """The same with the value V_t = −KL(π_θ‖π_T) as a baseline (arXiv 2605.07865):
    −(r_t − V_t) log π_θ(y_t). E[∇ log π_θ] = 0, so the mean stays. The variance mostly falls.
    """
    log_p, log_q = log_prob(student_logits, tokens), log_prob(teacher_logits, tokens)
    return -(log_q - log_p + kl(student_logits, teacher_logits)).detach() * log_p


def policy_gradient(student_logits: Tensor, teacher_logits: None, tokens: Tensor,
                    advantages: Tensor) -> Tensor:
    """−A log π_θ(y_t): GRPO's loss at one update per batch, where the clipped ratio is 1."""
    return -advantages * log_prob(student_logits, tokens)


def leave_one_out(group: Group) -> list[float]:
    """The success rate of the other K − 1 rollouts, for each rollout.

    μ̂ contains the rollout's own R: E[μ̂ | R_k = 1] − E[μ̂ | R_k = 0] = 1/K. The mean of the others
    does not depend on R_k. Averaged over the K rollouts it is μ̂ again.
    """
    correct = [rollout.correct for rollout in group.rollouts]
    return [(sum(correct) - own) / (len(correct) - 1) for own in correct]


def self_consistency(group: Group) -> float:
    """μ̂ without a verifier (B.6): the share of rollouts that agree with the teacher's own answer.

    A reference that gives no answer, or was cut off, agrees with none.
    """
    reference = data.extract(group.example, group.reference)
    return fmean(reference is not None and not rollout.truncated
                 and data.extract(group.example, rollout.text) == reference
                 for rollout in group.rollouts)


def add_references(groups: list[Group], teacher: Transformer, tokenizer: Tokenizer,
                   wording: Wording, sampling: Sampling, generator: torch.Generator) -> None:
    """a_ref ~ π_T(·|x, z): one completion of the teacher for each prompt (B.6)."""
    prompts = [tokenizer.chat(data.teacher_messages(
        group.example, wording, data.with_confidence(group.example.demo, 1.0))) for group in groups]
    sampled = sample_completions(teacher, tokenizer, prompts, 1, sampling, generator)
    for group, (ids,) in zip(groups, sampled):
        group.reference = tokenizer.decode(ids) if ids[-1] in tokenizer.eos_ids else ""


def correctness(rollout: Rollout) -> float:
    """GRPO's reward: R(x, a)."""
    return float(rollout.correct)


def calibrated_correctness(rollout: Rollout) -> float:
    """RLCR's reward (arXiv 2507.16806, as coded): ½ format + ½ R + ½ (1 − (R − c)²).

    Without a parsable confidence c, all of it is 0.
    """
    c, r = rollout.confidence, rollout.correct
    return 0.0 if c is None else 0.5 + 0.5 * r + 0.5 * (1 - (r - c) ** 2)


def group_advantages(group: Group, reward: Callable[[Rollout], float] | None,
                     standardize: bool) -> list[float]:
    """A_k = r_k − mean(r), divided by the standard deviation of r if `standardize`.

    Zeros for a method without a reward.
    """
    rewards = [reward(rollout) if reward else 0.0 for rollout in group.rollouts]
    scale = stdev(rewards) + 1e-4 if standardize and len(rewards) > 1 else 1.0
    return [(r - fmean(rewards)) / scale for r in rewards]


# ------------------------------------------------------------------------------- the methods


@dataclass(frozen=True)
class Method:
    """All that tells one method from another. Eq. 7 has two sums, and so there are two losses. One
    that is given as text is the name of the flag that chooses it."""

    title: str
    confidence: Callable[[Group], float | list[float]] | None  # replaces c; None: as sampled
    answer_loss: TokenLoss | str  # on I_a
    confidence_loss: TokenLoss | str  # on I_c
    reward: Callable[[Rollout], float] | None = None  # for the policy gradient
    standardize: bool = False  # divide advantages by their standard deviation
    teacher: bool = True  # score with the network that also sees z
    reference: bool = False  # sample the teacher's own answer, in place of a verifier

    @property
    def end_in_answer(self) -> bool:
        """Whether the first token of I_c is learned as the answer is.

        It may be the one with which the student chose to end its answer, as the toy's
        `⏎Confidence: ` is. Cross-entropy on one's own choices makes them likelier, right or wrong,
        so that answers can come to end early (theory/direct.py). And vOPD's estimate is right on
        average only if every choice at a position has it. Where the newline is a token of its own,
        the answer has ended before, and little depends on this.
        """
        return self.confidence_loss is target_cross_entropy or self.answer_loss is vopd


DIV, DIV_C = "divergence", "confidence_divergence"  # by default reverse KL, and forward KL

METHODS = {
    #                                         replaces c        on I_a      on I_c
    # Eq. 2, and Eq. 7 with Algorithm 1.
    "opd": Method("OPD",                      None,             DIV,        DIV),
    "caopd": Method("CaOPD",                  mu_hat,           DIV,        DIV_C),
    "caopd-sc": Method("CaOPD-SC",            self_consistency, DIV,        DIV_C, reference=True),
    # Not in the paper: the token to state is given, and is learned itself.
    "caopd-direct": Method("CaOPD-direct",    mu_hat,           DIV,        target_cross_entropy),
    "caopd-direct-loo": Method("CaOPD-LOO",   leave_one_out,    DIV,        target_cross_entropy),
    # Eq. 2 from single samples. Replaced tokens are no samples: I_c keeps the full KL.
    "sampled": Method("sampled OPD",          None,             sampled_kl, sampled_kl),
    "vopd": Method("vOPD",                    None,             vopd,       vopd),
    "caopd-vopd": Method("CaOPD-vOPD",        mu_hat,           vopd,       DIV_C),
    # Reinforcement learning from a reward, without a teacher.
    "grpo": Method("GRPO", None, policy_gradient, policy_gradient, reward=correctness,
                   standardize=True, teacher=False),
    "rlcr": Method("RLCR", None, policy_gradient, policy_gradient, reward=calibrated_correctness,
                   teacher=False),
}


def title(name: str) -> str:
    return METHODS[name].title if name in METHODS else name


def choose_losses(method: Method, args: "Args") -> tuple[TokenLoss, TokenLoss]:
    """The method's losses on I_a and on I_c, where flags have chosen the divergences.

    Eq. 7 has one divergence, the reverse KL. On a replaced confidence our default is the forward
    KL, as in the released code. The μ̂ of a prompt differs from step to step: it is a mean of K
    draws of probability μ(x). Forward KL learns the mixture of these targets, whose mean is μ(x).
    Reverse KL, where the teacher is sharp, settles on the likeliest of them, which is 0 wherever
    μ(x) < 1/(K + 1).
    """
    return tuple(DIVERGENCES[getattr(args, loss)] if isinstance(loss, str) else loss
                 for loss in (method.answer_loss, method.confidence_loss))


def method_targets(method: Method, group: Group, confidence: float | list[float] | None,
                   tokenizer: Tokenizer, wording: Wording, args: "Args") -> list[Target]:
    """Step 3 as the method has it: `make_targets`, with a context only for one that has a teacher,
    and with advantages only for one that has a reward. For the others they are 0 and unused."""
    advantages = group_advantages(group, method.reward, method.standardize)
    return make_targets(group, confidence, advantages, tokenizer, wording,
                        args.context if method.teacher else None, args.replace.split(","),
                        method.end_in_answer)


# ------------------------------------------------------------------ Algorithm 1: the training loop


def train(student: Transformer, name: str, tokenizer: Tokenizer, task: Task, args: "Args",
          out: Path) -> None:
    """Algorithm 1, where METHODS[name] says how each step is done. Trains `student` in place.

    The teacher starts as a copy of the student. Once it has mu_hat, the paper samples one more
    completion and distills that (line 10). The released code and ours distill the K rollouts
    themselves, so that a rollout's own R is a part of its target (leave_one_out takes it out). Each
    step leaves a line in out/metrics.jsonl, and an interrupted run goes on from its last
    checkpoint, to the same result.
    """
    method = METHODS[name]
    answer_loss, confidence_loss = choose_losses(method, args)
    sampling = rollout_sampling(args)
    teacher = make_teacher(student, args.teacher_device) if method.teacher else None
    optimizer = AdamW(student, args.weight_decay, args.clip)
    tensors = optimizer.tensors() | teacher_tensors(teacher, student)
    stage = Stage(name, out, settings(args, name, task), tensors, args.save_every, args.track)
    # A teacher that is shown μ̂ should predict its tokens, and how often it does is then logged.
    should_copy = asked_to_copy(method, confidence_loss, args.replace.split(","), task.wording)

    for step in stage.steps(args.steps):
        generator = seeded(args.seed, "rollout", step, student.device)

        # 1. Rollout: K completions y_k = (a_k, c_k) of each prompt x, verified by R(x, a_k). The
        #    prompts depend on seed and step alone. Each rank samples for its share of them, and
        #    then has the groups of all.
        examples = ranks.share(task.draw(args.prompts, "distill", step))
        with finite_logits(f"{name}, step {step}", tokenizer):
            groups = rollout(student, tokenizer, examples, task.wording, args.rollouts, sampling,
                             generator)
            if method.reference:
                add_references(groups, teacher, tokenizer, task.wording, sampling, generator)
        groups = ranks.gather(groups)

        # 2. Empirical confidence: mu_hat(x) = (1/K) sum_k R(x, a_k), or the method's own estimate.
        confidences = [method.confidence(group) if method.confidence else None for group in groups]

        # 3. Target replacement: mu_hat is stated in the completion and in the teacher's context.
        targets = [target for group, confidence in zip(groups, confidences) for target in
                   method_targets(method, group, confidence, tokenizer, task.wording, args)]

        # 4. Loss: the two sums of Eq. 7, and their gradient.
        losses, copied = step_gradient(student, teacher, targets, answer_loss, confidence_loss,
                                       args.skip_tokens, args.micro_tokens)

        # Update: AdamW for the student, and the teacher follows as its moving average.
        rounding = seeded(args.seed, "rounding", step, student.device)
        lr = args.lr * warmup_cosine(step, args.steps, args.warmup)
        grad_norm = optimizer.step(step, lr, rounding)
        if teacher is not None and args.teacher_rate > 0:
            ema_update(teacher, student, args.teacher_rate, rounding)

        row = summarize(groups, targets, losses)
        if should_copy:
            row["copied"] = copied
        stage.log(step, row | {"lr": lr, "grad_norm": grad_norm}, pick_samples(groups, step))
        stage.save_if_due(step)


@contextmanager
def finite_logits(where: str, tokenizer: Tokenizer) -> Iterator[None]:
    """Raises BadInput for logits that are not finite: where it was, after what, what to try."""
    try:
        yield
    except NotFinite as error:
        text = tokenizer.decode(error.prompt)[-200:]
        raise BadInput(f"{where}: the logits after {text!r} are not finite; {REMEDY}") from None


def asked_to_copy(method: Method, confidence_loss: TokenLoss, places: Collection[str],
                  wording: Wording) -> bool:
    """Whether the teacher is shown μ̂ and scores completions that state it.

    Its likeliest token should then be μ̂'s; `copied` in metrics.jsonl is the share of tokens of I_c
    where it is.
    """
    told = "demonstration" in places or ("instruction" in places and wording.report != "")
    scores = method.confidence is not None and confidence_loss in DIVERGENCES.values()
    return scores and "completion" in places and told


def seeded(seed: int, purpose: str, step: int, device: torch.device) -> torch.Generator:
    """Randomness of seed, purpose, step and rank alone, so that resuming needs no random state.

    Rank 0's is what a single process has.
    """
    key = f"{seed} {purpose} {step}" + (f" rank {ranks.rank()}" if ranks.rank() else "")
    return torch.Generator(device).manual_seed(zlib.crc32(key.encode()))


def summarize(groups: list[Group], targets: list[Target], loss: np.ndarray) -> dict:
    """A step's row in metrics.jsonl. `confidence` is the mean of those that could be parsed; both
    losses are divided by all tokens of the step, so that they add up."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    stated = [rollout.confidence for rollout in rollouts if rollout.confidence is not None]
    # One confidence for all is a collapse only where success differs from prompt to prompt.
    uneven = stated and pstdev(mu_hat(group) for group in groups) > 0.2
    return {
        "loss": float(loss.sum()), "loss_answer": float(loss[0]), "loss_confidence": float(loss[1]),
        "accuracy": fmean(rollout.correct for rollout in rollouts),
        "confidence": fmean(stated) if stated else math.nan,
        "format": len(stated) / len(rollouts),
        "collapse": Counter(stated).most_common(1)[0][1] / len(stated) if uneven else math.nan,
        "truncated": fmean(rollout.truncated for rollout in rollouts),
        "left_out": len(rollouts) - sum(sum(target.completions.values()) for target in targets)}


def pick_samples(groups: list[Group], step: int) -> list[dict]:
    """Rows of samples.jsonl: about 4 rollouts of a step, from other places of it at every step."""
    stride = max(1, len(groups) // 4)
    return [{"question": group.example.question, "answer": data.answer_part(rollout.text).strip(),
             "confidence": rollout.confidence, "mu_hat": mu_hat(group),
             "correct": rollout.correct}
            for group in groups[step % stride::stride] for rollout in group.rollouts[:1]]


# --------------------------------------------------------------------- batches that fit into memory

def micro_batches(costs: list[int], budget: int) -> list[list[int]]:
    """Cuts items, in order, into runs of indices that cost at most `budget` (or hold one item)."""
    batches, room = [], -1
    for i, cost in enumerate(costs):
        if cost > room:
            batches.append([])
            room = budget
        batches[-1].append(i)
        room -= cost
    return batches


def own_batches(costs: list[int], budget: int) -> list[list[int]]:
    """This rank's micro-batches: indices of its share of the items, that cost at most `budget`.

    All ranks have the same number of them, since all take part in each pass; the last ones of some
    ranks are empty.
    """
    every = []
    for share in ranks.shares(list(range(len(costs)))):
        every.append([[share[i] for i in batch]
                      for batch in micro_batches([costs[i] for i in share], budget)])
    own = every[ranks.rank()]
    return own + [[]] * (max(map(len, every)) - len(own))


# What stands in for an empty micro-batch: a completion of one token, which counts 0 times.
NOTHING_TO_LEARN = Target([0], [0], {Completion((0,), 1): 0})


# ------------------------------------------------------------------------------------- the teacher


def averaged_weights(teacher: Transformer,
                     student: Transformer) -> dict[str, tuple[Tensor, Tensor]]:
    """(the teacher's weight, the student's weight) by name, for the weights that are learned."""
    pairs = zip(student.named_parameters(), teacher.parameters())  # offloading renames the latter
    return {name: (average, weight) for (name, weight), average in pairs if weight.requires_grad}


@torch.no_grad()
def ema_update(teacher: Transformer, student: Transformer, rate: float,
               generator: torch.Generator) -> None:
    """θ_T ← (1 − rate) θ_T + rate θ, in float32; generator: for stochastic rounding.

    An offloaded teacher's weights visit the student's device, where the generator is.
    """
    ranks.forget_gathered(teacher)
    for pair in averaged_weights(teacher, student).values():
        average, weight = map(ranks.local, pair)
        value = average.to(weight.device).float().lerp_(weight.float(), rate)
        store(average, value, generator)


def teacher_tensors(teacher: Transformer | None, student: Transformer) -> dict[str, Tensor]:
    """What the EMA changes, by name, for checkpoints; nothing for a method without a teacher."""
    pairs = averaged_weights(teacher, student) if teacher is not None else {}
    return {f"teacher.{name}": average for name, (average, _) in pairs.items()}


def make_teacher(student: Transformer, device: str) -> Transformer:
    """A copy of the student without gradients; it shares the weights that the student keeps.

    device: "cpu" offloads its layers to main memory.
    """
    shared = {id(weight): weight for weight in student.parameters() if not weight.requires_grad}
    teacher = ranks.deepcopy(student, shared).requires_grad_(False)
    if device == "cpu":
        layers = teacher.model.layers
        teacher.model.layers = torch.nn.ModuleList(Offloaded(layer.cpu()) for layer in layers)
    return teacher


class Offloaded(torch.nn.Module):
    """A layer whose weights stay in main memory and visit the device of its input to compute."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *rest) -> Tensor:
        visitors = {name: w.to(x.device) for name, w in self.layer.named_parameters()}
        return torch.func.functional_call(self.layer, visitors, (x, *rest))


# ------------------------------------------------------- the supervised stage: makes the base model


def supervise(model: Transformer, tokenizer: Tokenizer, task: Task, args: "Args",
              out: Path) -> None:
    """Cross-entropy on written completions (`data.documents`). Trains `model` in place."""
    optimizer = AdamW(model, 0.0, args.clip)
    stage = Stage("base", out, settings(args, "base", task), optimizer.tensors(),
                  10 * args.save_every, args.track)
    for step in stage.steps(args.sft_steps):
        documents = data.documents(task, args.sft_documents, step, args.sft_steps, args.sft_answers,
                                   args.sft_noise, args.seed)
        prompts = [tokenizer.chat(document.messages) for document in documents]
        completions = [tokenizer.encode(document.completion)
                       + (tokenizer.eos_ids[:1] if document.ends else []) for document in documents]
        num_tokens, loss = sum(map(len, completions)), 0.0
        costs = [len(prompt) + len(ids) for prompt, ids in zip(prompts, completions)]
        for batch in own_batches(costs, args.micro_tokens):
            loss += supervised_gradient(model, [prompts[i] for i in batch],
                                        [completions[i] for i in batch], 1 / num_tokens)
        loss = float(ranks.total(np.array(loss))) / num_tokens
        lr = args.sft_lr * warmup_stable_decay(step, args.sft_steps)
        grad_norm = optimizer.step(step, lr, seeded(args.seed, "rounding", step, model.device))
        stage.log(step, {"loss": loss, "lr": lr, "grad_norm": grad_norm})
        stage.save_if_due(step)


def supervised_gradient(model: Transformer, prompts: list[list[int]], completions: list[list[int]],
                        scale: float) -> float:
    """Adds scale · ∇ Σ −log π(y_t) to the gradients; returns the sum, in nats, over M tokens."""
    # Without prompts a completion of one token is read, of which nothing is learned: M is 0.
    shared = SharedPrefix(prompts or [[0]], [[ids] for ids in completions] or [[[0]]],
                          model.device)
    learned = sum(map(len, completions))  # M
    hidden = model.hidden(shared.input_ids, shared.positions, shared)
    tokens = shared.tokens[:learned]  # [M]

    def losses_of(rows: slice, hidden: Tensor) -> Tensor:
        return target_cross_entropy(model.logits(hidden), None, tokens[rows])

    return backward_in_chunks(losses_of, hidden[shared.predicts[:learned]], rows_at_once(model),
                              scale).sum().item()


# ----------------------------------------------------------------------------- evaluation


def ask(model: Transformer, tokenizer: Tokenizer, examples: list[Example], wording: Wording,
        samples: int, sampling: Sampling, generator: torch.Generator, what: str) -> list[Group]:
    """`rollout` over many examples, which ranks share, with a progress bar that says `what`."""
    groups = []
    with tqdm(total=len(examples), desc=what, unit="question", dynamic_ncols=True,
              disable=not ranks.first()) as bar:
        for start in range(0, len(examples), 500):
            part = examples[start:start + 500]
            with finite_logits(what, tokenizer):
                groups += ranks.gather(rollout(model, tokenizer, ranks.share(part), wording,
                                               samples, sampling, generator))
            bar.update(len(part))
    return groups


def stated_and_correct(groups: list[Group]) -> tuple[np.ndarray, np.ndarray]:
    """(confidence, correct) of all answers, [N] each; NaN where no confidence could be parsed."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return (np.array([rollout.confidence for rollout in rollouts], dtype=float),
            np.array([rollout.correct for rollout in rollouts], dtype=float))


PAPER = {"temperature": 0.6, "top_p": 0.95}  # how the paper samples what it evaluates


@torch.no_grad()
def evaluate(model: Transformer, tokenizer: Tokenizer, examples: list[Example], wording: Wording,
             sampling: Sampling, seed: int, samples: int = 1, oracle_samples: int = 0,
             paper_samples: int = 0, name: str = "") -> tuple[dict, list[dict]]:
    """Asks every example `samples` times, as in deployment.

    Returns (figures, `answer_rows`). The figures are `every_readout` of the answers, with standard
    errors of what is stated (stderr), how many questions were asked, the share of truncated
    answers, reliability bins, and under by_grade `every_readout` of each grade. oracle_samples: how
    many further answers estimate μ(x), or 0. paper_samples: how many answers per question are
    sampled as the paper samples them; their metrics stand under `paper`. Ranks share the sampling;
    each of them computes what the model thinks of all answers.
    """
    model = model.for_inference()

    def sample(purpose: str, number: int, sampling: Sampling, samples: int, what: str):
        return ask(model, tokenizer, examples, wording, samples, sampling,
                   seeded(seed, purpose, number, model.device), f"{name}, {what}")

    groups = sample("evaluation", 1, sampling, samples, "evaluation")
    confidence, correct = stated_and_correct(groups)
    with finite_logits(f"{name}, evaluation", tokenizer):
        likelihoods, p = score_answers(model, tokenizer, groups, sampling.micro_tokens)
    mu = None
    if oracle_samples:
        # oracle_samples, which is never 1, is part of the seed: other draws than those above.
        others = sample("evaluation", oracle_samples, sampling, oracle_samples,
                        "to estimate μ(x)")
        mu = np.repeat([mu_hat(group) for group in others], samples)

    def figures_of(rows) -> dict:
        return every_readout(confidence[rows], correct[rows], p[rows], likelihoods[rows],
                             None if mu is None else mu[rows], oracle_samples)

    asked = [(example.system, example.question) for example in examples]
    # A question may be drawn twice, and the bootstrap draws all of its answers together.
    index = {pair: q for q, pair in enumerate(dict.fromkeys(asked))}
    questions = [index[pair] for pair in asked]
    own_grades = [str(example.grade) for example in examples]
    grades = np.repeat(own_grades, samples)
    figures = figures_of(slice(None)) | {
        "questions": len(groups),
        "stderr": bootstrap(confidence, correct, np.repeat(questions, samples), grades),
        "truncated": fmean(rollout.truncated for group in groups for rollout in group.rollouts),
        "reliability": reliability(confidence, correct),
        "by_grade": {grade: figures_of(grades == grade)
                     for grade in dict.fromkeys(grades.tolist())}}
    if paper_samples:
        answers = stated_and_correct(sample("paper", 1, replace(sampling, **PAPER), paper_samples,
                                            "sampled as in the paper"))
        figures["paper"] = calibration(*answers) | {
            "stderr": bootstrap(*answers, *(np.repeat(each, paper_samples)
                                            for each in (questions, own_grades)))}
    return figures, answer_rows(groups, likelihoods, p)


def answer_rows(groups: list[Group], likelihoods: np.ndarray, p: np.ndarray) -> list[dict]:
    """Rows of answers/NAME.jsonl: each answer, what it states, and what the model thinks of it.

    likelihoods [N], p [N, 101]: what `score_answers` returns.
    """
    rollouts = [(group.example, rollout) for group in groups for rollout in group.rollouts]
    return [{"question": example.question, "grade": example.grade, "text": rollout.text,
             "truncated": rollout.truncated, "correct": rollout.correct,
             "confidence": rollout.confidence, "expected": float(mean), "likelihood": float(own)}
            for (example, rollout), mean, own in zip(rollouts, expected(p), likelihoods)]


def score_answers(model: Transformer, tokenizer: Tokenizer, groups: list[Group],
                  tokens_at_once: int) -> tuple[np.ndarray, np.ndarray]:
    """What the model thinks of each answer that it sampled, at temperature 1.

    Returns π_θ(a|x), the product over the answer's tokens and the one that ends it, [N], and the
    probability of each of the 101 VALUES as its confidence, given that it is one of them, [N, 101].
    All 101 segments share what they begin with, and their common prefixes are computed once. So are
    answers that came out the same. Raises NotFinite.
    """
    keys = []  # of each rollout: prompt, answer, the token that ended it, how the segment begins
    for group in groups:
        for rollout in group.rollouts:
            n, before = data.split_completion(tokenizer, rollout.ids)
            answer, end = tuple(rollout.ids[:n]), tuple(rollout.ids[n:n + 1])
            keys.append((tuple(group.prompt), answer, end, before))
    distinct = list(dict.fromkeys(keys))
    trees = {before: ConfidenceTree(tokenizer, before) for before in {key[-1] for key in keys}}
    costs = [len(prompt) + len(answer) + trees[before].num_tokens
             for prompt, answer, _, before in distinct]
    likelihoods, rows = {}, {}
    for batch in tqdm(micro_batches(costs, tokens_at_once), desc="scoring answers", unit="batch",
                      dynamic_ncols=True, leave=False, delay=1, disable=not ranks.first()):
        part = [distinct[i] for i in batch]
        each = [trees[before] for *_, before in part]
        prefixes = [[*prompt, *answer, *its.start] for (prompt, answer, *_), its in zip(part, each)]
        shared = SharedPrefix(prefixes, [its.parents for its in each], model.device)
        hidden = model.hidden(shared.input_ids, shared.positions, shared)
        lengths = [len(ids) for ids in prefixes]
        after = hidden[shared.predicts].split([its.num_tokens for its in each])
        for key, its, first, h in zip(part, each, hidden[:sum(lengths)].split(lengths), after):
            prompt, answer, end, _ = key
            likelihoods[key] = likelihood(model, first[len(prompt) - 1:], answer + end)
            log_p = model.logits(h).float().log_softmax(-1).cpu()  # [num_tokens, V]
            scores = (log_p[its.rows, its.tokens] * its.real).sum(1)  # [101]
            if not (scores.isfinite().all() and math.isfinite(likelihoods[key])):
                raise NotFinite("logits of the confidence", list(prompt + answer))
            rows[key] = scores.softmax(0)
    return (np.array([likelihoods[key] for key in keys]),
            torch.stack([rows[key] for key in keys]).double().numpy())


def likelihood(model: Transformer, hidden: Tensor, tokens: Sequence[int]) -> float:
    """Π_t π_θ(y_t) of T tokens that the first T of these hidden states, [.., D], predict."""
    size, ids = rows_at_once(model), torch.tensor(tokens, device=hidden.device).long()
    chunks = zip(hidden[:len(ids)].split(size), ids.split(size))
    return math.exp(sum(log_prob(model.logits(h), part).sum().item() for h, part in chunks))


class ConfidenceTree:
    """The 101 confidence segments as token ids: `start`, which all share, then a branch for each.

    In the toy `start` is `⏎Confidence: `, the branch of 0.53 is (`0.5`, `3`), and its parent is
    (`0.5`,): the logits after 11 parents give the probabilities of all 101 branches.
    parents: the distinct branches without their last token, each followed by a dummy, which
    SharedPrefix drops, as it does every last token. The first token of 0.53 is scored by the
    logits after `start`, its second by those after the parent. rows, tokens, real [101, L]: where
    the logits of a branch's tokens stand among those of the parents; `real` is 0 for padding.
    """

    def __init__(self, tokenizer: Tokenizer, before: str):
        ids = [tokenizer.encode_rest(before + data.format_confidence(value)) for value in VALUES]
        self.start = os.path.commonprefix(ids)
        branches = [tuple(segment[len(self.start):]) for segment in ids]
        parents = list(dict.fromkeys(branch[:-1] for branch in branches))
        self.parents = [[*parent, 0] for parent in parents]
        self.num_tokens = sum(map(len, self.parents))
        first = dict(zip(parents, np.cumsum([0, *map(len, self.parents)])))
        shape = len(branches), max(map(len, branches))
        self.rows, self.tokens = torch.zeros(shape).long(), torch.zeros(shape).long()
        self.real = torch.zeros(shape)
        for i, branch in enumerate(branches):
            n = len(branch)
            self.rows[i, :n] = int(first[branch[:-1]]) + torch.arange(n)
            self.tokens[i, :n] = torch.tensor(branch)
            self.real[i, :n] = 1


# ----------------------------------------------------------------------------- the command line

RUN, DISTILL, SAMPLE, BASE, TOY, EVAL, HARDWARE = (
    "what to run", "distillation", "lengths and sampling", "supervised stage (makes the base)",
    "the embedded world's transformer", "evaluation", "hardware")

# What has to be made again when a flag changes: ALL (the base model, and all that is trained from
# it), METHOD (what a method has trained) or NOTHING. A model or checkpoint is taken up again only
# where every flag that decides it is the same.
ALL, METHOD, NOTHING = "all", "method", "nothing"

TRACKERS = "wandb", "trackio", "tensorboard"


def flag(group: str, decides: str, default, help: str, choices: tuple | None = None, real=None):
    """A field of Args. real: its default with --model, where that is another one."""
    if real is not None:
        default, defaults = None, (default, real)
    else:
        defaults = (default, default)
    return dataclasses.field(default=default, metadata={
        "group": group, "decides": decides, "help": help, "choices": choices, "defaults": defaults})


@dataclass
class Args:
    """The command line: one field for each flag. None stands for a default that --model changes;
    of ask and explain, for a flag that was not given."""

    method: str = flag(RUN, NOTHING, "opd,caopd,caopd-direct", "what to train from the same base, "
                       "separated by commas: " + ", ".join(METHODS) + "; `both` is opd,caopd, "
                       "`base` asks the base alone, and with --model needs no --train")
    task: str = flag(RUN, ALL, "arithmetic", "the questions and their verifier; mcq and tool need "
                     "--train and --eval", data.TASKS)
    model: str = flag(RUN, ALL, "", "a Hugging Face model directory, or a hub name; without it, "
                      "the embedded world")
    template_args: str = flag(RUN, ALL, "{}", "variables for the model's chat template, as a JSON "
                              'object: \'{"enable_thinking": false}\' turns off Qwen3\'s thinking')
    train: list = flag(RUN, NOTHING, (), "JSONL files to train on, with --model: `prompt`, "
                       "`answer`, optionally `system`, `demo`, `grade`")
    eval: list = flag(RUN, NOTHING, (), "JSONL files of held-out questions in the same form, or "
                      "the share of --train that is held out, such as 0.1")
    out: str = flag(RUN, NOTHING, "", "directory for results, metrics and models (default out/toy, "
                    "or out/TASK with --model)")
    overwrite: bool = flag(RUN, NOTHING, False, "write over what other settings have made in "
                          "--out; make again what this very command has finished there")
    seed: int = flag(RUN, ALL, 0, "seed of everything random")
    track: str = flag(RUN, NOTHING, "", "also send figures and samples to one of these, which has "
                      "to be installed", TRACKERS)
    explain: list = flag(RUN, NOTHING, None, "follow a question, such as 47*8, or one of the "
                         "held-out ones, through Algorithm 1; nothing is trained")
    ask: list = flag(RUN, NOTHING, None, "ask the models in --out these questions, or those of "
                     "standard input, --rollouts times each; nothing is trained")

    steps: int = flag(DISTILL, METHOD, 600, "updates of each method", real=100)
    prompts: int = flag(DISTILL, METHOD, 16, "prompts per step", real=32)
    rollouts: int = flag(DISTILL, METHOD, 8, "K, completions per prompt: the paper finds "
                         "calibration wants K >= 8")
    lr: float = flag(DISTILL, METHOD, 6e-4, "AdamW's peak learning rate: warm-up, then "
                     "cosine to 0", real=1e-5)
    warmup: int = flag(DISTILL, METHOD, 40, "steps of warm-up, at most a tenth of --steps", real=10)
    weight_decay: float = flag(DISTILL, METHOD, 0.0, "AdamW's weight decay, of matrices", real=0.01)
    lora_rank: int = flag(DISTILL, ALL, 0, "learn adapters of this rank (LoRA) on every linear "
                          "layer of attention and MLP, and leave the model as it is; 0 learns all "
                          "of it")
    lora_alpha: float = flag(DISTILL, ALL, 0.0, "what an adapter adds is multiplied by alpha / "
                             "rank; 0 takes twice the rank")
    save_adapter: bool = flag(DISTILL, METHOD, False, "also save the adapters alone, in PEFT's "
                              "format, in METHOD/adapter")
    clip: float = flag(DISTILL, ALL, 1.0, "largest gradient norm")
    divergence: str = flag(DISTILL, METHOD, "reverse", "on the answer, and on OPD's confidence: "
                           "KL(student||teacher) as in Eq. 2, KL(teacher||student), or "
                           "Jensen-Shannon", tuple(DIVERGENCES))
    confidence_divergence: str = flag(DISTILL, METHOD, "forward", "on CaOPD's confidence: "
                                      "reverse (Eq. 7) settles on the likeliest mu_hat, forward "
                                      "(the released code) learns their mean", tuple(DIVERGENCES))
    teacher_rate: float = flag(DISTILL, METHOD, 0.0, "EMA rate of the teacher per step: 0 is a "
                               "frozen teacher, 1 the live student", real=0.05)
    context: str = flag(DISTILL, METHOD, "demo", "privileged context z: a demonstration (SDFT), or "
                        "another correct rollout of the student (SDPO)", ("demo", "solution"))
    replace: str = flag(DISTILL, METHOD, ",".join(REPLACEMENTS), "where mu_hat replaces the "
                        "confidence (the embedded world's teacher has no instruction)")
    skip_tokens: int = flag(DISTILL, METHOD, 0, "leave the first tokens of each completion out of "
                            "the loss (the released code: 3)")

    max_prompt: int = flag(SAMPLE, NOTHING, 1024, "longest prompt in tokens; a longer one is "
                           "refused, never cut")
    skip_long: bool = flag(SAMPLE, NOTHING, False, "leave longer prompts out, counted, instead of "
                           "refusing")
    max_new_tokens: int = flag(SAMPLE, METHOD, 16, "longest completion in tokens; one cut off here "
                               "counts as wrong", real=1024)
    temperature: float = flag(SAMPLE, METHOD, 1.0, "sampling temperature of rollouts")

    sft_steps: int = flag(BASE, ALL, 1200, "updates that teach the format, the habit of high "
                          "confidence, and how to follow a demonstration", real=0)
    sft_documents: int = flag(BASE, ALL, 128, "documents per step, half closed-book, half "
                              "open-book", real=32)
    sft_lr: float = flag(BASE, ALL, 3e-3, "peak learning rate", real=2e-4)
    sft_noise: float = flag(BASE, ALL, 0.25, "share of wrong closed-book answers, so that the base "
                            "knows better than it writes", real=0.2)
    sft_answers: float = flag(BASE, ALL, 0.5, "share of the updates, at the start, that teach "
                              "answers alone, in documents that stop before the "
                              "confidence", real=0.0)

    width: int = flag(TOY, ALL, 128, "hidden size")
    layers: int = flag(TOY, ALL, 3, "number of layers")

    eval_questions: int = flag(EVAL, NOTHING, 1200, "ask N held-out questions: of a file "
                               "the first N; generated ones can come twice", real=500)
    eval_temperature: float = flag(EVAL, NOTHING, 1.0, "sampling temperature; mu_hat is measured "
                                   "at --temperature, and at another one other shares are right")
    eval_top_p: float = flag(EVAL, NOTHING, 1.0, "nucleus sampling")
    eval_samples: int = flag(EVAL, NOTHING, 4, "answers per question", real=1)
    paper_samples: int = flag(EVAL, NOTHING, 2, "answers per question, sampled as the paper "
                              "evaluates: temperature 0.6, top-p 0.95; 0 leaves it out", real=4)
    oracle: int = flag(EVAL, NOTHING, 4, "also estimate each question's success rate mu(x) from N "
                       "samples: what a confidence c = mu(x) would score; 0 leaves it out")
    split: str = flag(EVAL, NOTHING, "held-out", "validation asks a further fifth of the "
                      "questions, and leaves them out of training: for choosing settings",
                      data.SPLITS)

    device: str = flag(HARDWARE, NOTHING, "auto", "cpu, cuda or cuda:i; auto takes a GPU where "
                       "there is one")
    dtype: str = flag(HARDWARE, ALL, "auto", "auto is bfloat16 for --model where the hardware "
                      "multiplies it natively, else float32", ("auto", "float32", "bfloat16"))
    rounding: str = flag(HARDWARE, ALL, "nearest", "for bfloat16: nearest keeps float32 master "
                         "weights of student and teacher; stochastic keeps only bfloat16, rounded "
                         "at random and right on average, in 14 bytes per weight instead of 20",
                         ("nearest", "stochastic"))
    recompute: bool = flag(HARDWARE, NOTHING, False, "activation checkpointing: keep each layer's "
                           "input alone and compute the layer again, in several times less memory "
                           "per token; a step has taken up to 15 % longer (tests/BENCH.md)")
    teacher_device: str = flag(HARDWARE, NOTHING, "same", "cpu offloads the teacher's layers to "
                               "main memory and brings them over one at a time", ("same", "cpu"))
    micro_tokens: int = flag(HARDWARE, METHOD, 16384, "tokens computed at once; lower it when "
                             "memory runs out: the loss stays the same, samples are drawn in "
                             "another order", real=4096)
    save_every: int = flag(HARDWARE, NOTHING, 50, "updates between checkpoints, ten times as many "
                           "in the supervised stage; an interrupted run goes on from the last one")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise BadInput(f"{message} (see --help)")


def argument(field: dataclasses.Field) -> dict:
    """What argparse has to know of a field of Args: its type, and the help with its defaults."""
    help = field.metadata["help"].replace("%", "%%")  # argparse fills in what a % announces
    choices, default = field.metadata["choices"], field.default
    if field.type is bool:
        return {"action": "store_true", "help": help}
    if field.type is list:
        nargs, metavar, default = ("*", "QUESTION", None) if default is None else ("+", "PATH", [])
        return {"action": "extend", "nargs": nargs, "metavar": metavar, "default": default,
                "help": help}
    toy, real = field.metadata["defaults"]
    if toy != real:
        help += f" [{toy}; with --model {real}]"
    elif toy != "":
        help += f" [{toy}]"
    word = {"out": "PATH", "template_args": "JSON"}.get(field.name, "NAME")
    metavar = None if choices else {int: "N", float: "X", str: word}[field.type]
    return {"type": field.type, "default": argparse.SUPPRESS, "choices": choices,
            "metavar": metavar, "help": help}


def parse_args(argv: list[str] | None) -> Args:
    """Reads the command line into Args and fills in the defaults. Raises BadInput."""
    # METHODS and what stands behind them are told to readers of this file alone.
    about = "\n\n".join(part for part in __doc__.split("\n\n") if not part.startswith("METHODS"))
    parser = Parser(prog="caopd.py", usage="caopd.py [--flag value ...]", description=about,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {}
    for field in dataclasses.fields(Args):
        name = field.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        groups[name].add_argument("--" + field.name.replace("_", "-"), **argument(field))
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if value == "":
            raise BadInput(f"--{name.replace('_', '-')}: its value is empty, perhaps that of a "
                           "variable that is not set")
    args = Args(**given)
    for field in dataclasses.fields(Args):
        if getattr(args, field.name) is None:
            setattr(args, field.name, field.metadata["defaults"][bool(args.model)])
    args.method = "opd,caopd" if args.method == "both" else args.method
    args.model = args.model.rstrip("/") or args.model
    args.out = args.out or os.path.join("out", args.task if args.model else "toy")
    check_values(args)
    check_together(args)
    return args


def check_values(args: Args) -> None:
    """Refuses flags whose value cannot work, whatever the others say."""
    def require(wish: str, holds: Callable, *names: str):
        for name in names:
            if not holds(getattr(args, name)):
                flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
                raise BadInput(f"{flag}: it should be {wish}")

    whole = [field.name for field in dataclasses.fields(Args) if field.type is int]
    require("a whole number below 2^31", lambda n: abs(n) < 2 ** 31, *whole)
    require("at least 1", lambda n: n >= 1, "steps", "max_prompt", "max_new_tokens", "micro_tokens",
            "save_every")
    require("between 1 and a million", lambda n: 1 <= n <= 10 ** 6, "prompts", "rollouts",
            "sft_documents", "eval_questions", "eval_samples")
    require("between 0 and a million", lambda n: 0 <= n <= 10 ** 6, "oracle", "paper_samples")
    require("between 1 and 8192", lambda n: 1 <= n <= 8192, "width", "layers")
    require("0 or more", lambda n: n >= 0, "lora_rank", "sft_steps", "skip_tokens", "warmup")
    require("at least 2 samples per question, or 0", lambda n: n != 1, "oracle")
    require("over 0 and at most 1", lambda x: 0 < x <= 1, "lr", "sft_lr", "eval_top_p")
    require("a positive number", lambda x: 0 < x < math.inf, "clip")
    # Below it the quotient of logits and temperature may overflow.
    require("at least 0.001", lambda x: 1e-3 <= x < math.inf, "temperature")
    require("0, or at least 0.001", lambda x: x == 0 or 1e-3 <= x < math.inf, "eval_temperature")
    require("a number, 0 or more", lambda x: 0 <= x < math.inf, "weight_decay", "lora_alpha")
    require("between 0 and 1", lambda x: 0 <= x <= 1, "teacher_rate", "sft_noise", "sft_answers")
    require("a multiple of 8 (the embedded world's transformer has 4 heads)", lambda n: n % 8 == 0,
            "width")
    require("one or several of " + ", ".join(METHODS) + ", each once, separated by commas, or both "
            "or base", lambda text: text == "base" or (
                len(set(text.split(",")) & METHODS.keys()) == text.count(",") + 1), "method")
    require("one or several of " + ", ".join(REPLACEMENTS) + ", separated by commas",
            lambda text: set(text.split(",")) <= set(REPLACEMENTS), "replace")
    if not isinstance(parse_json(args.template_args, "--template-args"), dict):
        raise BadInput(f"--template-args {args.template_args}: it should be a JSON object, such "
                       'as {"enable_thinking": false}')
    if args.track and find_spec(args.track) is None:
        raise BadInput(f"--track {args.track}: it is not installed; pip install {args.track}")


def check_together(args: Args) -> None:
    """Refuses flags that cannot work together."""
    methods = [METHODS[name] for name in methods_of(args)]
    compared = any(m.confidence is leave_one_out or m.reward for m in methods) or (
        args.context == "solution" and any(m.teacher for m in methods))
    if compared and args.rollouts < 2:
        raise BadInput(f"--rollouts 1: --method {args.method} with --context {args.context} uses "
                       "a prompt's other rollouts, and needs 2 or more")
    sampled = {sampled_kl, vopd, policy_gradient}
    if args.temperature != 1 and any(method.answer_loss in sampled for method in methods):
        raise BadInput(f"--temperature {args.temperature}: {args.method} learns from samples of "
                       "the student itself, at temperature 1")
    if any(method.reference for method in methods) and args.context != "demo":
        raise BadInput("--method caopd-sc needs --context demo: without a verifier no rollout is "
                       "known to be correct")
    if "completion" not in args.replace.split(",") and any(
            method.confidence_loss is target_cross_entropy for method in methods):
        raise BadInput(f"--replace {args.replace}: {args.method} learns the replaced tokens of the "
                       "completion, and has none without `completion`")
    told_alone = set(args.replace.split(",")) == {"instruction"}
    if not args.model and told_alone and not data.SYMBOLS.report:
        raise BadInput("--replace instruction: the embedded world's teacher has no instruction, so "
                       "that nothing would be replaced")
    for name in ("save_adapter", "lora_alpha"):
        if getattr(args, name) and not args.lora_rank:
            raise BadInput(f"--{name.replace('_', '-')}: only --lora-rank N makes an adapter")
    if args.lora_rank and args.teacher_device == "cpu":
        raise BadInput("--teacher-device cpu: with --lora-rank the teacher is the student's own "
                       "model with adapters of its own, and takes next to no memory")
    if any(method.reference for method in methods) and args.teacher_device == "cpu":
        raise BadInput("--method caopd-sc samples from the teacher: leave out --teacher-device")
    if (args.train or args.eval) and not args.model:
        raise BadInput("--train and --eval need --model: the embedded world's tiny tokenizer "
                       "knows nothing but arithmetic")
    has_questions = args.task == "arithmetic" or args.train or args.eval or args.ask is not None
    needs_train = saved_stages(args) or args.split != "held-out" or held_out_share(args) is not None
    complete = (args.eval or args.split != "held-out") if args.train else not (
        args.eval and needs_train)
    if not complete or not has_questions:
        raise BadInput(f"--task {args.task} needs both --train FILE.jsonl and --eval FILE.jsonl, "
                       "or a share such as --eval 0.1")
    if args.explain is not None and not methods:
        raise BadInput("--explain with --method base: name a method, whose steps it can follow")
    if ranks.size() > 1 and (args.ask is not None or args.explain is not None):
        raise BadInput("--ask and --explain need one process: leave out torchrun")
    if ranks.size() > 1 and args.teacher_device == "cpu":
        raise BadInput("--teacher-device cpu: with several processes the teacher is spread over "
                       "their devices")
    if (share := held_out_share(args)) is not None and not 0 < share < 0.8:
        raise BadInput(f"--eval {args.eval[0]}: a share should be over 0 and under 0.8")


def held_out_share(args: Args) -> float | None:
    """The share of --train that --eval holds out, or None where --eval names files."""
    if len(args.eval) != 1:
        return None
    try:
        return float(args.eval[0])
    except ValueError:
        return None


def settings(args: Args, stage: str, task: Task) -> dict:
    """What determines the result of a stage: its flags, by name, and its training questions."""
    deciding = (ALL,) if stage == "base" else (ALL, METHOD)
    chosen = {field.name: getattr(args, field.name) for field in dataclasses.fields(Args)
              if field.metadata["decides"] in deciding}
    return {"stage": stage, "questions": task.fingerprint} | chosen


def methods_of(args: Args) -> list[str]:
    """The methods to train; none for --method base."""
    return [name for name in args.method.split(",") if name in METHODS]


def saved_stages(args: Args) -> list[str]:
    """The stages that leave a model in --out. A --model that is not trained first is the base."""
    return [*(["base"] if args.sft_steps or not args.model else []), *methods_of(args)]


def rollout_sampling(args: Args) -> Sampling:
    return Sampling(args.max_new_tokens, args.temperature, micro_tokens=args.micro_tokens)


def eval_sampling(args: Args) -> Sampling:
    """How evaluation and --ask sample."""
    return replace(rollout_sampling(args), temperature=args.eval_temperature,
                   top_p=args.eval_top_p)


# ----------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns the exit code.

    0, or 2 for a request that cannot be served, or 1 where another rank is lost, or 130 when
    interrupted: by Ctrl-C, by a request to end (SIGTERM), or by the end of its terminal (SIGHUP,
    unless nohup has it ignored).
    """
    for name in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) == signal.SIG_DFL:
            signal.signal(name, signal.default_int_handler)
    out = sys.stdout if ranks.first() else None
    with redirect_stdout(Unbroken(out)), redirect_stderr(Unbroken(sys.stderr)):
        return serve(argv)


def serve(argv: list[str] | None) -> int:
    """Runs a command line, and turns what can end it early into a sentence and an exit code."""
    def say(words: str) -> None:
        if ranks.first_to_end():
            print(words, file=sys.stderr)

    try:
        args = parse_args(argv)
        if args.ask is None and args.explain is None:
            import pipeline  # here, as show below, since both import this file
            with ranks.connected():
                pipeline.run(args)
        else:
            import show
            show.run(args)
    except BadInput as error:
        say("caopd.py: error: " + " ".join(str(error).split()))
        return 2
    except torch.OutOfMemoryError:
        less = ("--recompute goes" if ranks.size() > 1 else
                "--recompute and --teacher-device cpu go")
        say(f"caopd.py: error: the GPU has run out of memory; {less} on from the last checkpoint "
            "with less of it, and so do, from the start, a lower --micro-tokens and --dtype "
            "bfloat16 --rounding stochastic")
        return 2
    except KeyboardInterrupt:
        say("\nInterrupted. The same command goes on from the last checkpoint.")
        return 130
    except RuntimeError as error:
        if not ranks.lost_another(error):
            raise
        say("\nAnother process of this run cannot be reached, and all end. The same command goes "
            f"on from the last checkpoint. ({str(error).splitlines()[0]})")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
