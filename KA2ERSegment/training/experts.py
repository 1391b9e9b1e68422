"""Stage of each expert: a whole nnU-Net on its own task, of which the encoder becomes the expert.

KA2ER (arXiv 2410.21085) pre-trains one nnU-Net (Isensee et al., 2021) for each task and freezes it ever after. Bundles
keep the encoder; the decoder lies beside it, as the amalgamation's training distils its predictions.
"""

from __future__ import annotations

import logging
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from KA2ERSegment.build import load_tensors, tensors_by_name
from KA2ERSegment.bundle import Bundle
from KA2ERSegment.encoders.expert import build_network
from KA2ERSegment.errors import BundleError
from KA2ERSegment.plans import ExpertPlans
from KA2ERSegment.training import losses
from KA2ERSegment.training.run import Run, fit, take_fitting
from KA2ERSegment.training.sampling import IGNORE, ClassMap, SamplingOptions, TargetDataset
from KA2ERSegment.training.stages import Stage, channels_last, seeded

logger = logging.getLogger("KA2ERSegment")


class ExpertStage(Stage):
    """A whole nnU-Net, trained on its own task with Dice and cross-entropy; its encoder becomes the expert.

    Args:
        plans: of the expert.
        steps: at most.
        minutes: at most.
        learning_rate: at its peak.
        seed: of the random state.
    """

    def __init__(self, plans: ExpertPlans, steps: int, minutes: float, learning_rate: float, seed: int) -> None:
        super().__init__(steps, minutes, learning_rate, seed)
        with seeded(seed):
            network = build_network(plans, deep_supervision=False)
        self.network = channels_last(network)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One step."""
        loss = losses.multi_class_loss(self.network(self.images(batch)[:, :1]), batch["classes"], IGNORE)
        self.log("loss", loss, prog_bar=True)
        return loss

    def encoder_weights(self) -> dict[str, Tensor]:
        """What the bundle keeps: the encoder."""
        return tensors_by_name(cast("torch.nn.Module", self.network.encoder))

    def decoder_weights(self) -> dict[str, Tensor]:
        """What the amalgamation's training asks for predictions: the rest of the network."""
        return {name: t for name, t in tensors_by_name(self.network).items() if not name.startswith("encoder.")}


def train_expert(run: Run, expert: ExpertPlans, task: ClassMap) -> None:
    """Train one expert, and leave its encoder and the rest of its network in files; nothing where they are there.

    Args:
        run: options; its settings have a section `expert`.
        expert: its plans.
        task: its own: items and classes.
    """
    if run.expert_weights(expert).exists():
        return
    options = run.budget("expert")
    fitting = take_fitting(options)
    own = [item for item in run.items if task.covers(item)]
    module = ExpertStage(expert, **options)
    sampling = SamplingOptions(run.plans.patch_size, run.plans.margin, lesions=0.0, parts=0.0, unions=0.0)
    trainer = fit(module, TargetDataset(own, sampling, module.seed, [task]), run.output / expert.name, run, **fitting)
    if trainer.is_global_zero:
        weights = {name: tensor.detach().contiguous() for name, tensor in module.encoder_weights().items()}
        save_file({n: t.detach().contiguous() for n, t in module.decoder_weights().items()}, run.expert_decoder(expert))
        save_file(weights, run.expert_weights(expert))  # last: by it the stage is known to be done
    trainer.strategy.barrier()  # the next stage reads the file


def take_over_experts(run: Run, start: Bundle) -> None:
    """The experts of a bundle to begin from are laid where their stages would leave them, so those are not run."""
    weights = start.weights()
    run.output.mkdir(parents=True, exist_ok=True)
    for expert in run.plans.experts:
        prefix = f"experts.{expert.name}.encoder."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if not run.expert_weights(expert).exists():
            save_file(own, run.expert_weights(expert))


def trained_encoders(run: Run, must: bool) -> dict[str, dict[str, Tensor]]:
    """Tensors of the experts' encoders by expert name.

    Args:
        run: of their stages.
        must: whether all must be there; else those that are not are left out.

    Raises:
        BundleError: one is missing that must be there.
    """
    missing = [expert.name for expert in run.plans.experts if not run.expert_weights(expert).exists()]
    if missing and must:
        message = (
            f"the amalgamation needs all experts of the config, got none of {missing} in {str(run.output)!r}. Run "
            "their stages first, or begin with --start from a bundle that has them."
        )
        raise BundleError(message)
    present = (expert for expert in run.plans.experts if expert.name not in missing)
    return {expert.name: load_file(run.expert_weights(expert)) for expert in present}


def trained_decoders(run: Run) -> dict[str, torch.nn.Module]:
    """Decoders of the experts whose whole network was trained here: only their predictions can be distilled."""
    decoders = {}
    for expert in run.plans.experts:
        if not run.expert_decoder(expert).exists():
            logger.warning("expert %s has no decoder in %s: its predictions are not distilled", expert.name, run.output)
            continue
        network = build_network(expert, deep_supervision=False)
        encoder = {f"encoder.{name}": tensor for name, tensor in load_file(run.expert_weights(expert)).items()}
        load_tensors(network, encoder | load_file(run.expert_decoder(expert)))
        decoders[expert.name] = cast("torch.nn.Module", network.decoder)
    return decoders
