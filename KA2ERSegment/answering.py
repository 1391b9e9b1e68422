"""From the prompts of an object to the network's answer: choose a patch, decode, look again until the object fits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from KA2ERSegment.cancellation import checkpoint
from KA2ERSegment.constraints import MARGIN, keep_change_local, keep_in_box, remove_islands
from KA2ERSegment.domain import Fingerprint, log_prior
from KA2ERSegment.errors import SessionStateError
from KA2ERSegment.gate import GENERAL
from KA2ERSegment.geometry import Box
from KA2ERSegment.mask_decoder import Decoded
from KA2ERSegment.model import PatchFeatures, PromptableModel
from KA2ERSegment.plans import Plans
from KA2ERSegment.prediction import Ballots, FloatImage, PackedMask
from KA2ERSegment.preprocessing import Patch, RawPatch, image_statistics, normalise, sample_image
from KA2ERSegment.prompt_encoder import PatchPrompts
from KA2ERSegment.rasterise import Evidence, mask_on_patch, patch_prompts, samples_in
from KA2ERSegment.refinement import Detail, Refiner
from KA2ERSegment.states import ObjectState
from KA2ERSegment.volume import Volume
from KA2ERSegment.zoom import Answer, fits, mask_faces, regrown, trust

OPINIONS = 16
"""Opinions of single arms and decoders that are kept, each as large as a patch."""


class Answerer:
    """The network on one volume; keeps the features of the patches that it saw last.

    Args:
        model: the network.
        plans: of its patches.
        device: it is on.
        canonical: the volume, in canonical axes.
        feature_bytes: bound on the features that are kept.
    """

    def __init__(
        self, model: PromptableModel, plans: Plans, device: torch.device, canonical: Volume, feature_bytes: float
    ) -> None:
        self.model, self.plans, self.device, self.canonical = model, plans, device, canonical
        self.refiner = Refiner(canonical, plans.refinement)
        self.features: OrderedDict[tuple[Patch, tuple[str, ...]], PatchFeatures] = OrderedDict()
        self._feature_bytes = feature_bytes
        self._opinions: OrderedDict[tuple[int, int | str], tuple[Answer, FloatImage]] = OrderedDict()
        self._ballots: tuple[Answer, Ballots] | None = None
        self._closed = False

    def forget(self) -> None:
        """Free the memory of kept features and opinions."""
        self.features.clear()
        self._opinions.clear()
        self._ballots = None
        self.refiner.forget()

    def close(self) -> None:
        """Forget the features; nothing can be asked any more."""
        self.forget()
        self._closed = True

    # -- answers -----------------------------------------------------------------------------------------------------

    def answer(
        self,
        own: ObjectState,
        newest: Evidence,
        others: Sequence[PackedMask],
        experts: tuple[str, ...],
    ) -> Answer:
        """Choose patches and decode until the object fits its patch.

        Args:
            own: the object, its evidence with the newest prompt, its answer and mask those before.
            newest: the newest prompt alone.
            others: masks that count as outside.
            experts: that take part.
        """
        evidence = own.evidence
        if own.drawing is not None:  # a hand drew on it since it was started from
            evidence = replace(evidence, start=own.mask if own.mask.box.size else None)

        def decode(patch: Patch, before: Answer | None) -> Answer:
            return self._decode(patch, evidence, before, newest, others, experts)

        if own.answer is not None and newest.box is None and newest.start is None and fits(own.answer.patch, newest):
            answer = decode(own.answer.patch, own.answer)
        elif evidence.box is None and evidence.start is None and evidence.extent() is not None and own.answer is None:
            answer = max((decode(patch, None) for patch in self._zooms(evidence)), key=trust)
        else:
            answer = decode(self._patch_around(evidence, own.answer), own.answer)
        if evidence.extent() is None:  # nobody has said where the object is
            return replace(answer, logits=np.minimum(answer.logits, np.float32(-MARGIN)))
        if evidence.box is not None and evidence.flat is None:  # a 3D box bounds the object
            return answer
        for _ in range(4):
            patch = regrown(answer, evidence, own.answer, self.canonical, self.plans.margin)
            if patch is None:
                break
            fitted = decode(patch, None)
            if not (fitted.logits > 0).any():
                break
            answer = fitted
        return answer

    def drawn(self, before: Answer | None, mask: PackedMask, evidence: Evidence) -> Answer:
        """The answer that a mask drawn by hand stands for; the network is not asked.

        Samples that the network had right keep its logits. The patch stays where it holds the mask.
        """
        extent = evidence.extent() or Box.of_shape(self.canonical.shape_kji)
        start, stop = np.array(extent.start), np.array(extent.stop)
        if before is not None and (not mask.box.size or before.patch.contains([start, stop - 1])):
            inside = samples_in(mask, before.patch)
            as_drawn = _logits(mask_on_patch(mask, before.patch))
            return replace(before, logits=np.where((before.logits > 0) == inside, before.logits, as_drawn))
        patch = Patch.fit(start, stop, self.canonical.spacing, self.plans.patch_size, self.plans.margin)
        return Answer(patch, _logits(mask_on_patch(mask, patch)), None, (), np.zeros((0, 1, 1, 1), dtype=np.float32))

    def _patch_around(self, evidence: Evidence, before: Answer | None) -> Patch:
        """The patch for a box, a mask to start from, or prompts beyond the former patch."""
        extent = evidence.extent()
        start, stop = (np.array(extent.start, float), np.array(extent.stop, float)) if extent else (None, None)
        if start is None or stop is None:  # negative prompts alone: look where they are
            boxes = [Box(ijk, (ijk[0] + 1, ijk[1] + 1, ijk[2] + 1)) for ijk, _ in evidence.clicks]
            around = boxes[0] if boxes else evidence.regions[0][0]
            start, stop = np.array(around.start, float), np.array(around.stop, float)
        if evidence.flat is not None and evidence.box is not None:  # the object's reach across the slice is unknown
            spacing = np.array(self.canonical.spacing)
            length = np.delete((stop - start) * spacing, evidence.flat).max() / spacing[evidence.flat]
            middle = (start[evidence.flat] + stop[evidence.flat]) / 2
            start[evidence.flat] = min(start[evidence.flat], middle - length / 2)
            stop[evidence.flat] = max(stop[evidence.flat], middle + length / 2)
        if before is not None and evidence.box is None:
            found = mask_faces(before)
            if found is not None:
                start, stop = np.minimum(start, found[0]), np.maximum(stop, found[1])
        return Patch.fit(start, stop, self.canonical.spacing, self.plans.patch_size, self.plans.margin)

    def _zooms(self, evidence: Evidence) -> list[Patch]:
        """Patches for a first click. Without a box the size is unknown: several zooms, of which one is trusted most."""
        extent = evidence.extent()
        assert extent is not None, "checked by the caller"
        spacing = self.canonical.spacing
        centre = (np.array(extent.start) + np.array(extent.stop) - 1) / 2
        least = ((np.array(extent.stop) - np.array(extent.start)) * spacing).max() * 1.3
        most = (np.array(self.canonical.shape_ijk) * spacing).max()
        sides = [max(min(side, most), least, 8 * min(spacing)) for side in self.plans.zooms_mm]
        return [Patch.cube(centre, side, spacing, self.plans.patch_size) for side in dict.fromkeys(sides)]

    def _decode(
        self,
        patch: Patch,
        evidence: Evidence,
        before: Answer | None,
        newest: Evidence,
        others: Sequence[PackedMask],
        experts: tuple[str, ...],
    ) -> Answer:
        """One pass of prompt encoder and mask decoder; features come from the store where it has them."""
        checkpoint()
        same = before is not None and before.patch == patch
        previous: FloatImage | None = None
        if newest.start is not None:
            previous = mask_on_patch(newest.start, patch)
        elif before is not None and same:
            previous = np.asarray(1 / (1 + np.exp(-before.logits)), dtype=np.float32)
        elif evidence.start is not None:
            previous = mask_on_patch(evidence.start, patch)
        prompts = patch_prompts(evidence, patch, previous, others)
        features = self._features_of(patch, experts)
        checkpoint()
        with torch.inference_mode():
            decoded = self.model.decode(features, _to(prompts, self.device))
        logits: FloatImage = decoded.logits[0].cpu().numpy()
        checkpoint()
        if before is not None and same and newest.box is None and newest.start is None:
            logits = keep_change_local(logits, before.logits, _samples(newest, patch))
        if evidence.box is not None and evidence.flat is None:
            logits = keep_in_box(logits, prompts.box[0].numpy(), prompts.positive[0].numpy())
        logits = remove_islands(logits, prompts.positive[0].numpy())
        weights = features.weights[0, self._arms_at(experts)].float().cpu().numpy()
        answer = Answer(patch, logits, prompts, experts, weights, *self._heard(decoded))
        return answer if decoded.votes is None else replace(answer, votes=decoded.votes[0].float().cpu().numpy())

    def _heard(self, decoded: Decoded) -> tuple[dict[str, float], dict[str, float]]:
        """Weights of the gate, and the decoders that were heard with their shares."""
        if decoded.gate is None or decoded.heard is None:
            return {}, {GENERAL: 1.0}
        gate = self.model.gate
        assert gate is not None, "weights of a gate come from one"
        weights = dict(zip(gate.decoders, decoded.gate[0].tolist(), strict=True))
        chosen = int(decoded.heard[0])
        if not chosen:
            return weights, {GENERAL: 1.0}
        name = gate.decoders[chosen]
        return weights, {GENERAL: 1 - weights[name], name: weights[name]}

    # -- features ----------------------------------------------------------------------------------------------------

    def _arms_at(self, experts: tuple[str, ...]) -> list[int]:
        return [0, *(self.model.arms.index(name) for name in experts)]

    def _features_of(self, patch: Patch, experts: tuple[str, ...]) -> PatchFeatures:
        if (patch, experts) not in self.features:
            self.features[patch, experts] = self._encoded(patch, experts)
        self.features.move_to_end((patch, experts))
        # Looked at each time: answers and opinions add what their decoders make of the features.
        while len(self.features) > 1 and sum(kept.nbytes for kept in self.features.values()) > self._feature_bytes:
            self.features.popitem(last=False)
        return self.features[patch, experts]

    def _encoded(self, patch: Patch, experts: tuple[str, ...]) -> PatchFeatures:
        everyone = self.model.arms[1:]
        if experts != everyone:
            with torch.inference_mode():
                return self.model.among(self._features_of(patch, everyone), self._arms_at(experts))
        image, inside = sample_image(self.canonical.array_kji, patch)
        checkpoint()
        raw = self._raw(image, inside, patch).to(self.device) if self.model.reads_raw else None
        with torch.inference_mode():
            patch_image = normalise(image[None], inside[None]).to(self.device)
            return self.model.encode(patch_image, raw=raw, prior=self._prior)

    def _raw(self, image: Tensor, inside: Tensor, patch: Patch) -> RawPatch:
        step = np.multiply(patch.step, self.canonical.spacing)[::-1].astype(np.float32)  # mm, KJI
        unit = torch.ones(1, dtype=torch.bool)
        return RawPatch(image[None], inside[None], torch.from_numpy(step)[None], self._statistics[None], unit)

    @cached_property
    def _prior(self) -> Tensor | None:
        """(1, K+1), how likely the volume is one of each expert's; None where the plans do not say."""
        prior = log_prior(self.plans, Fingerprint.of(self.canonical))
        return None if prior is None else torch.from_numpy(prior)[None].float().to(self.device)

    @cached_property
    def _statistics(self) -> Tensor:
        return image_statistics(self.canonical.array_kji)

    def opinion_of(self, answer: Answer) -> Callable[[int], FloatImage]:
        """What a `Prediction` calls: the logits of one arm alone; the newest few are kept."""

        def opinion(arm: int) -> FloatImage:
            def ask(prompts: PatchPrompts) -> Tensor:
                features = self._features_of(answer.patch, self.model.arms[1:])
                return self.model.opinion(features, prompts, self._arms_at(answer.experts)[arm])

            return self._opinion(answer, arm, ask)

        return opinion

    def decoder_of(self, answer: Answer) -> Callable[[str], FloatImage]:
        """What a `Prediction` calls: the logits of one mask decoder alone, by its name; the newest few are kept."""

        def opinion(name: str) -> FloatImage:
            def ask(prompts: PatchPrompts) -> Tensor:
                return self.model.decoder_opinion(self._features_of(answer.patch, answer.experts), prompts, name)

            return self._opinion(answer, name, ask)

        return opinion

    def _opinion(self, answer: Answer, whose: int | str, ask: Callable[[PatchPrompts], Tensor]) -> FloatImage:
        """Logits (S, S, S), from the store where it has them."""
        self._require_open()
        assert answer.prompts is not None, "an answer without prompts has no experts"
        key = (id(answer), whose)
        if key not in self._opinions:
            with torch.inference_mode():
                logits = ask(_to(answer.prompts, self.device))[0].cpu().numpy()
            self._opinions[key] = answer, logits  # as long as the answer is kept, nothing else has its id
            if len(self._opinions) > OPINIONS:
                self._opinions.popitem(last=False)
        return self._opinions[key][1]

    def detail_of(self, shown: Answer, own: ObjectState) -> Callable[[], Detail]:
        """What a `Prediction` calls: an answer's logits between the patch's samples, where the image says more.

        Beyond a 3D box, and what else was prompted, nothing is added; a mask that is to be smooth does not follow the
        image, and one that a hand drew is as it drew it.
        """
        evidence = own.evidence
        bound = evidence.extent() if evidence.box is not None and evidence.flat is None else None
        plain = own.finish.smoothing_mm > 0 or shown.prompts is None

        def detail() -> Detail:
            return Detail(shown.patch, shown.logits) if plain else self.refiner.detail(shown.logits, shown.patch, bound)

        return detail

    def voters_of(self, answer: Answer) -> tuple[str, ...]:
        """Names of the experts that voted on an answer; nobody where a hand drew it without any prompt."""
        return self.model.voters if answer.prompts is not None else ()

    def ballots_of(self, answer: Answer) -> Callable[[], Ballots]:
        """What a `Prediction` calls: what each voting expert said and counted; those asked for last are kept."""

        def ballots() -> Ballots:
            self._require_open()
            if self._ballots is None or self._ballots[0] is not answer:
                assert answer.prompts is not None, "nobody votes on an answer without prompts"
                features = self._features_of(answer.patch, answer.experts)
                with torch.inference_mode():
                    votes = self.model.votes(features, _to(answer.prompts, self.device))
                assert votes is not None, "only asked for where there are voters"
                arrays = (tensor[0].float().cpu().numpy() for tensor in (votes.weights, votes.opinions))
                self._ballots = answer, Ballots(*arrays)
            return self._ballots[1]

        return ballots

    def _require_open(self) -> None:
        if self._closed:
            message = "the experts of a prediction can be asked while its volume is the session's; it was changed."
            raise SessionStateError(message)


def _samples(newest: Evidence, patch: Patch) -> list[tuple[int, int, int]]:
    """Samples (K, J, I) of the newest clicks and regions; a region gives at most a hundred."""
    voxels = [np.array(ijk) for ijk, _ in newest.clicks]
    for box, crop, _ in newest.regions:
        inside = np.argwhere(crop)[:, ::-1] + np.array(box.start)
        voxels += list(inside[:: max(1, len(inside) // 100)])
    samples = []
    for voxel in voxels:
        i, j, k = np.clip(np.round(patch.to_patch(voxel)), 0, patch.size - 1).astype(int).tolist()
        samples.append((k, j, i))
    return samples


def _logits(probability: FloatImage) -> FloatImage:
    return np.asarray(np.log(probability / (1 - probability)), dtype=np.float32)


def _to(prompts: PatchPrompts, device: torch.device) -> PatchPrompts:
    tensors = {name: getattr(prompts, name).to(device) for name in PatchPrompts.__slots__}
    return PatchPrompts(**tensors)
