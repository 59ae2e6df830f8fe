"""What a student learns from a teacher, and how near it comes: a denoiser whose objective asks another model."""

import numpy as np
import torch
from torch import Tensor, nn

from workers.bits import STUDENT, name_validation
from workers.config import VALIDATION_IMAGES, SamplerConfig
from workers.denoising import Denoising
from workers.diffusion.formulations import AnyProcess
from workers.diffusion.guidance import ToldModel, tell
from workers.diffusion.ledger import compute_standard_error
from workers.diffusion.objectives import Teaching
from workers.diffusion.predictions import Denoiser
from workers.diffusion.process import Model, Process
from workers.diffusion.samplers import draw
from workers.lessons import Validation
from workers.noise import make_generator
from workers.passes import JUMP, TEACHER_STEPS


class Studying(Denoising):
    @property
    def measure(self) -> str:
        return STUDENT if self.student else name_validation(self.dataset.levels)

    def make_teaching(self, step: int, told: Tensor | None = None) -> Teaching:
        return Teaching(step, self._tell_teacher(told))

    def _tell_teacher(self, told: Tensor | None) -> Model:
        teacher = self.trial.loss.teacher
        assert teacher and self.teacher
        return tell(self.teacher, told, teacher.guidance)

    def validate(self, network: nn.Module) -> Validation:
        """What a student misses of its teacher, and a grid of samples."""
        if self.student is None:
            return super().validate(network)
        assert self.process
        model = Denoiser(network, self.process, self.prediction)
        missed = self.measure_distance_to_teacher(model)
        error = compute_standard_error(missed)  # of a single image there is none
        values = {self.measure: float(missed.mean())} | ({} if error is None else {f"{self.measure}_se": error})
        return Validation(values, {"samples": self.draw_samples(model)})

    def measure_distance_to_teacher(self, model: ToldModel | Model) -> np.ndarray:
        """The mean square over pixels of what a student draws less what its teacher does, of the same noise, by image.

        By progressive, DDIM in the student's steps and in twice as many of its teacher; by consistency, one jump and
        Heun's rule. Both are on the scale of [-1, 1], and not clipped.
        """
        whole, process, device = self.process, self.drawn, self.world.device
        assert process.student and whole
        height, width, channels = self.space.find_shape(self.dataset.shape)
        noise = make_generator(self.trial.seed, "valid", "student")
        n = min(VALIDATION_IMAGES, len(self.dataset.held_out))
        x_T = torch.randn((n, channels, height, width), generator=noise).to(device)
        told = self.take_told(n)
        if isinstance(whole, Process) and process.student.steps:
            stride = whole.T // (2 * process.student.steps)
            own = theirs = SamplerConfig(kind="ddim")
            taught: AnyProcess = whole.kept(stride * torch.arange(1, 2 * process.student.steps + 1))
        else:
            own, theirs, taught = JUMP, SamplerConfig(kind="heun", steps=TEACHER_STEPS), whole
        ours = draw(process, tell(model, told), own, x_T, noise, clip=False).x_0
        meant = draw(taught, self._tell_teacher(told), theirs, x_T, noise, clip=False).x_0
        return np.asarray((ours - meant).double().square().flatten(1).mean(1).cpu().numpy())
