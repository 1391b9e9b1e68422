"""Stage `gate`: the gate of SAM-Med3D-MoE (arXiv 2407.04938) learns when a specialist beats the general decoder.

Model and decoders are frozen. Patches of all items, those that no expert covers too, are encoded once, prompts are
simulated, and of each prompt only what the gate reads and the Dice of every decoder is kept (`observing.py`); on these
the gate trains in seconds. The labels are soft, with the general decoder among them: they teach not to switch where a
specialist is no better. Temperature and tau come from subjects that neither gate nor specialists were trained on; tau
is the one with the best Dice on the specialists' tasks among those that cost all other tasks half a point of Dice at
most, and 1 (nobody is heard) where none brings anything.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy import optimize
from torch import Tensor

from KA2ERSegment.build import build_model, tensors_by_name
from KA2ERSegment.bundle import Bundle
from KA2ERSegment.errors import BundleError, VolumeError
from KA2ERSegment.experts import Content
from KA2ERSegment.gate import Gate, choose
from KA2ERSegment.model import PromptableModel
from KA2ERSegment.plans import GatePlans, Plans
from KA2ERSegment.training.calibrate import uncalibrated
from KA2ERSegment.training.card import with_section
from KA2ERSegment.training.feeding import Feed, workers_for
from KA2ERSegment.training.items import TrainingItem
from KA2ERSegment.training.observing import Observations, observe
from KA2ERSegment.training.run import Run, Unfinished, digest, made_for, on_first_rank
from KA2ERSegment.training.sampling import TargetDataset
from KA2ERSegment.training.specialists import SECTION
from KA2ERSegment.training.stages import seeded

logger = logging.getLogger("KA2ERSegment")

REGRET = 0.1
"""Weight of the expected regret beside the cross-entropy."""
FORGETTING = 0.005
"""Dice that all other tasks may lose on average."""
PARTS = {"learning": 0.65, "held-out": 0.3}
"""Shares of the stage's minutes and cases; the rest of the time is for training."""
THRESHOLDS = tuple(n / 20 for n in range(21))
"""Values of tau that are tried."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One value of tau on subjects held out.

    Args:
        threshold: tau.
        general: mean Dice on tasks without a specialist.
        forgotten: how much less that is than the general decoder's.
        specific: mean Dice on the specialists' tasks, each counting the same.
        heard: share of the prompts for which a specialist is heard.
    """

    threshold: float
    general: float
    forgotten: float
    specific: float
    heard: float


def train_gate(run: Run, start: Bundle) -> None:
    """Observe, learn, choose temperature and tau, and write `run.bundle` with them.

    Args:
        run: options; its settings have a section `gate`.
        start: a bundle with specialists; all its tensors but those of the gate stay as they are.

    Raises:
        BundleError: the bundle has no specialists.
        VolumeError: no item without an expert is held out: forgetting could not be seen.
        Unfinished: the call's time is up.
    """
    on_first_rank(lambda: _train_gate(run, Content.of(start)))
    run.clock.began = time.monotonic()


def _train_gate(run: Run, content: Content) -> None:
    options = run.budget("gate")
    former, report = content.plans.gate, run.output / "gate.json"
    if former is None:
        message = "the gate chooses among specialist decoders, and the bundle has none. Run stage 'specialists' first."
        raise BundleError(message)
    base = digest(content.tensors, ("gate.", "voting."))
    this = {"base": base, "temperature": former.temperature, "threshold": former.threshold}
    if report.exists() and json.loads(report.read_text()).items() >= this.items():
        return
    model = build_model(content.plans, dict(content.tensors)).to("cuda" if run.on_gpu else "cpu").requires_grad_(False)
    parts = zip(PARTS, run.divided(), strict=True)
    learning, held = (_observations(run, model, content.plans, part, items, base) for part, items in parts)
    names = former.specialists
    special = [number for number, task in enumerate(run.tasks, start=1) if task.name in names]
    if not bool((~torch.isin(held.family, torch.tensor(special))).any()):
        message = "the gate needs items that no specialist is for, from two subjects or more, to see what is forgotten."
        raise VolumeError(message)
    plans = GatePlans(names, hidden=int(options.get("hidden", 128)))
    with seeded(int(options["seed"])):
        fresh = Gate(content.plans.width, plans)
    gate = learn(fresh, learning, int(options["epochs"]), float(options["learning_rate"]), int(options["seed"]))
    temperature = fit_temperature(gate, held)
    trials = sweep(gate, held, temperature, special)
    best = best_trial(trials)
    plans = replace(plans, temperature=temperature, threshold=best.threshold)
    tensors = {name: tensor for name, tensor in content.tensors.items() if not name.startswith("gate.")}
    tensors |= {f"gate.{name}": tensor.detach() for name, tensor in tensors_by_name(gate).items()}
    text = _words(best, trials[-1], plans, len(learning), len(held))
    card = with_section(content.card, SECTION, text)
    changed = replace(content, plans=replace(content.plans, gate=plans), tensors=tensors, card=card)
    uncalibrated(changed).save(run.bundle, force=True)
    found: dict[str, Any] = {"base": base, "temperature": temperature, "threshold": best.threshold}
    found |= {"learning": len(learning), "held_out": len(held), "trials": [asdict(trial) for trial in trials]}
    report.write_text(json.dumps(found, indent=1) + "\n")
    logger.info("gate: %s", text)


def learn(gate: Gate, seen: Observations, epochs: int, learning_rate: float, seed: int = 0) -> Gate:
    """Train a gate on observations: cross-entropy with the soft labels, and a little of the expected regret.

    Args:
        gate: is trained in place, and returned ready for use.
        seen: to learn from.
        epochs: over all observations, 64 at a time.
        learning_rate: at the start; it falls to zero.
        seed: of order and dropout.
    """
    order = torch.Generator()
    order.manual_seed(seed)
    gate.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=learning_rate, weight_decay=1e-2)
    with seeded(seed):
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
            for some in torch.split(torch.randperm(len(seen), generator=order), 64):
                optimizer.zero_grad()
                loss = gate_loss(gate(seen.query[some]), seen.labels[some], seen.alone[some])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return gate.eval().requires_grad_(False)


def gate_loss(logits: Tensor, labels: Tensor, dice: Tensor) -> Tensor:
    """Cross-entropy with soft labels plus a tenth of the expected regret; all (N, K+1), the mean over N."""
    regret = (logits.softmax(dim=1) * (dice.amax(dim=1, keepdim=True) - dice)).sum(dim=1)
    return F.cross_entropy(logits, labels) + REGRET * regret.mean()


def fit_temperature(gate: Gate, held: Observations) -> float:
    """The temperature of the softmax with the least cross-entropy on observations that it did not learn from."""
    logits = gate(held.query)

    def entropy(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / math.exp(log_temperature), held.labels))

    bounds = (math.log(0.1), math.log(10.0))
    return float(math.exp(optimize.minimize_scalar(entropy, bounds=bounds, method="bounded").x))


def sweep(gate: Gate, held: Observations, temperature: float, special: Sequence[int]) -> list[Trial]:
    """What each of `THRESHOLDS` brings and costs.

    Args:
        gate: trained.
        held: what it did not learn from.
        temperature: of its softmax.
        special: families that have a specialist; all others are the general tasks.
    """
    logits = gate(held.query)
    allowed = torch.ones(len(held), logits.shape[1] - 1, dtype=torch.bool)
    families = [held.family == number for number in special if bool((held.family == number).any())]
    rest = ~torch.isin(held.family, torch.tensor(list(special)))
    general = float(held.dice[rest, 0, 0].mean())
    trials = []
    for threshold in THRESHOLDS:
        weights, heard = choose(logits, allowed, temperature, threshold)
        dice = held.fused(weights, heard)
        specific = torch.stack([dice[family].mean() for family in families]).mean() if families else torch.zeros(())
        kept, share = float(dice[rest].mean()), float((heard > 0).float().mean())
        trials.append(Trial(threshold, kept, general - kept, float(specific), share))
    return trials


def best_trial(trials: Sequence[Trial]) -> Trial:
    """The best on the specialists' tasks of those that forget little; of equals the most cautious."""
    mindful = [trial for trial in trials if trial.forgotten <= FORGETTING]
    return max(mindful, key=lambda trial: (round(trial.specific, 6), trial.threshold))


def _observations(
    run: Run, model: PromptableModel, plans: Plans, part: str, items: Sequence[TrainingItem], base: str
) -> Observations:
    """Observations on some items, until a share of the stage's minutes is spent or there are enough.

    They are kept in the run's folder; with `resume` they are read from there.
    """
    file = run.output / f"gate-{part}.safetensors"
    if run.resume and made_for(file, base):
        return Observations(**load_file(file))
    options, share, device = run.budget("gate"), PARTS[part], next(model.parameters()).device
    seed = int(options["seed"]) + list(PARTS).index(part)
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    until = time.monotonic() + share * 60 * float(options["minutes"])
    sampling = run.sampling(plans)
    dataset = TargetDataset(items, sampling, seed, run.tasks)
    feed = Feed(dataset, int(options["batch"]), workers_for(run.on_gpu, run.workers, 1), run.on_gpu)
    seen: list[Observations] = []
    cases = 0
    for batch in feed:
        on_device = {key: value.to(device) for key, value in batch.items()}
        seen += observe(model, on_device, int(options["clicks"]), generator)
        cases += len(batch["target"])
        if cases >= share * int(options["cases"]) or time.monotonic() > until:
            break
        if time.monotonic() >= run.clock.stop_at:
            stage = "gate"
            raise Unfinished(stage)
    found = Observations.joined(seen)
    logger.info("gate: %d prompts of %d cases observed, %s", len(found), cases, part)
    run.output.mkdir(parents=True, exist_ok=True)
    save_file({field.name: getattr(found, field.name) for field in fields(found)}, file, {"base": base})
    return found


def _words(best: Trial, never: Trial, plans: GatePlans, learning: int, held: int) -> str:
    """What was found, for the model card; `never` is the trial in which nobody is heard."""
    return (
        f"Copies of the mask decoder, finetuned on the task of one expert each: {', '.join(plans.specialists)}. A gate "
        f"(after SAM-Med3D-MoE, arXiv 2407.04938), trained on {learning} simulated prompts, hears one where its weight "
        f"is above {plans.threshold:g}, at temperature {plans.temperature:.2f}. On {held} prompts of training subjects "
        f"held out: Dice on the specialists' tasks {best.specific:.3f}, with the general decoder alone "
        f"{never.specific:.3f}; on all other tasks {best.general:.3f} and {never.general:.3f}; a specialist is heard "
        f"for {best.heard:.0%} of them."
    )
