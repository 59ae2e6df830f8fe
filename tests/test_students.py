"""Students: closed forms for Gaussian pixels, what they are taught, and what may not be asked of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_files import experiment, problems, search
from small_process import F64, config, denoiser_of_gaussian, normal, process

from orchestrator.experiment.expand import expand, find_starting_rows
from orchestrator.experiment.records import ExperimentError
from orchestrator.experiment.settings import merge
from orchestrator.measuring.subjects import check, find
from orchestrator.origins import pin_starts
from orchestrator.sweep import list_trials
from workers.config import DiffusionConfig, LossConfig, SamplerConfig
from workers.data.dataset import prepare
from workers.data.sources import describe
from workers.diffusion.distillation import find_gap, find_progressive_x_0
from workers.diffusion.formulations import Continuous, make_process, take_student
from workers.diffusion.objectives import Objective, Teaching
from workers.diffusion.predictions import find_target, from_eps, interpret
from workers.diffusion.process import Model, Prediction, Process, at
from workers.diffusion.samplers import draw
from workers.first_weights import describe_trial, find_misfits
from workers.loss_settings import TeacherConfig
from workers.mistakes import Mistake
from workers.network import checkpoint as checkpoints
from workers.network import manifest
from workers.network.student_config import make_config, read_config
from workers.noise import make_generator
from workers.storage import Storage
from workers.students import Student
from workers.training import train
from workers.warm_start import INIT, TEACHER, TRUNK

S, T = 0.2, 64
SMALL: dict[str, Any] = {
    "model": {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [4], "dropout": 0.0},
    "diffusion": {"T": 16, "schedule": {"kind": "cosine"}, "prediction": "v"},
    "training": {"steps": 3, "batch_size": 16, "ema": 0.9, "precision": "float32", "validate_every": 3},
    "evaluation": {"nll": None, "fid": None},
}
TAUGHT = {"teacher": {"source": "base"}}
TEACHER_CONFIG = TeacherConfig(source="base")
NEEDS: dict[str, dict[str, Any]] = {"base": {"loss": {"objective": "mse", "teacher": None}}}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def ddim(p: Process, model: Model, x_T: torch.Tensor) -> torch.Tensor:
    return draw(p, model, SamplerConfig(kind="ddim"), x_T, make_generator(0), clip=False).x_0


def taught(whole: Process, steps: int, teacher: Model) -> tuple[Process, Model]:
    """The student of a teacher that is linear in x_t, exactly as its target has it; asked at the times of `whole`."""
    own = take_student(whole, Student("progressive", "", steps))
    assert isinstance(own, Process)

    def model(x: torch.Tensor, end: torch.Tensor) -> Prediction:
        t = end * steps // whole.T
        x_0 = find_progressive_x_0(own, whole, teacher, x, t)
        alpha_bar = whole.alpha_bar[end - 1].reshape(-1, 1, 1, 1)
        return Prediction(x_0, (x - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt())

    return own, model


def test_a_chain_of_students_comes_in_one_step_where_a_gaussian_teacher_comes_in_all() -> None:
    """Each is exact, so that the last has the teacher's DDIM in T steps in one: for many, of variance s^2."""
    whole = process(T, kind="cosine")
    teacher = model = denoiser_of_gaussian(whole, S)
    steps = T // 2
    x_T = normal(5, 1, 2, 2)
    all_steps = ddim(whole, teacher, x_T)
    while steps >= 1:
        own, model = taught(whole, steps, model)
        assert steps == own.T
        torch.testing.assert_close(ddim(own, model, x_T), all_steps, rtol=1e-4, atol=1e-6)
        steps //= 2
    alpha_bar = whole.alpha_bar[-1]
    exact = S / (alpha_bar * S**2 + 1 - alpha_bar).sqrt()  # of the flow itself, which DDIM of T steps is near
    assert float((all_steps / x_T).mean()) == pytest.approx(float(exact), rel=0.1)


@pytest.mark.parametrize("steps", [8, 2, 1])
def test_the_target_of_a_student_leads_where_two_steps_of_its_teacher_do(steps: int) -> None:
    whole = process(16, kind="cosine")
    teacher = from_eps(whole, lambda x, t: torch.sin(3 * x + t.reshape(-1, 1, 1, 1)))
    own = take_student(whole, Student("progressive", "", steps))
    finer = whole.kept(16 // (2 * steps) * torch.arange(1, 2 * steps + 1))
    assert isinstance(own, Process)
    t, x_t = torch.arange(1, steps + 1), normal(steps, 1, 2, 3)
    x_0 = find_progressive_x_0(own, whole, teacher, x_t, t)

    def step(p: Process, x: torch.Tensor, k: torch.Tensor, x_0: torch.Tensor) -> torch.Tensor:
        eps = (x - at(p.alpha_bar.sqrt(), k, x) * x_0) / at((1 - p.alpha_bar).sqrt(), k, x)
        return at(p.alpha_bar_before.sqrt(), k, x) * x_0 + at((1 - p.alpha_bar_before).sqrt(), k, x) * eps

    x = x_t
    for k in (2 * t, 2 * t - 1):
        x = step(finer, x, k, teacher(x, finer.times[k - 1]).x_0)
    torch.testing.assert_close(step(own, x_t, t, x_0), x, rtol=1e-7, atol=1e-9)


def test_a_student_that_says_its_target_has_no_loss() -> None:
    diffusion, p = config(16, "cosine"), process(16, kind="cosine")
    diffusion = diffusion.model_copy(update={"prediction": "v"})
    loss = LossConfig(objective="progressive", student_steps=4, weighting="truncated_snr", teacher=TEACHER_CONFIG)
    objective = Objective.of(diffusion, loss, 256)
    teacher, own = denoiser_of_gaussian(p, S), objective.process
    assert isinstance(own, Process) and own.times.tolist() == [4, 8, 12, 16]
    t, x_0, eps = torch.arange(1, 5), normal(4, 1, 2, 3), normal(4, 1, 2, 3, seed=1)

    def say(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        found = find_progressive_x_0(own, p, teacher, x, k)
        noise = (x - at(own.alpha_bar.sqrt(), k, x) * found) / at((1 - own.alpha_bar).sqrt(), k, x)
        return find_target("v").of(own, found, x, k, noise)

    teaching = Teaching(0, teacher)
    assert objective(say, x_0, t, eps, teaching).weighted.max() < 1e-12
    assert objective(lambda x, k: say(x, k) + 0.1, x_0, t, eps, teaching).weighted.min() > 1e-4


def test_diffusers_draws_from_a_student_in_its_own_steps() -> None:
    from diffusers import DDIMScheduler

    whole, student = process(16, kind="cosine"), Student("progressive", "ab", 4)
    scheduler_config = make_config(whole, "v", student)
    assert read_config(scheduler_config).student == student
    scheduler: Any = DDIMScheduler.from_config(scheduler_config)
    scheduler.set_timesteps(4)
    own = take_student(whole, student)
    assert isinstance(own, Process)
    assert [t + 1 for t in scheduler.timesteps.tolist()] == own.times.tolist()[::-1]

    def say(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * x + t.reshape(-1, 1, 1, 1))

    x_T = normal(2, 1, 3, 3).float()
    x = x_T
    for t in scheduler.timesteps:
        x = scheduler.step(say(x, (t + 1).expand(len(x))), t, x).prev_sample
    model: Model = lambda x, t: interpret(whole, "v", x, t, say(x, t))  # noqa: E731
    ours = draw(own, model, SamplerConfig(kind="ddim", steps=4), x_T, make_generator(0), clip=True).x_0
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


# ---- Consistency


@pytest.mark.parametrize("formulation", ["edm", "flow"])
def test_a_consistency_function_is_the_identity_without_noise(formulation: str) -> None:
    p = make_process(DiffusionConfig(formulation=formulation))
    assert isinstance(p, Continuous)
    x, said = normal(3, 1, 2, 2), normal(3, 1, 2, 2, seed=1)
    assert torch.equal(p.formulation.target.x_0(p, x, torch.zeros(3, dtype=F64), said), x)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_and_so_along_a_chain(prediction: str) -> None:
    nearly = Process.of_betas(torch.tensor([1e-15, 0.5]), "fixed_small")
    x, said = normal(1, 1, 2, 2), normal(1, 1, 2, 2, seed=1)
    found = find_target(prediction).x_0(nearly, x, torch.tensor([1]), said)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("diffusion", [DiffusionConfig(formulation="edm"), DiffusionConfig(formulation="flow"),
                                       config(100, "cosine")])  # fmt: skip
def test_the_flow_of_a_gaussian_teacher_is_nearly_consistent(diffusion: DiffusionConfig) -> None:
    """x_0 = s y / sqrt(s^2 + sigma^2) along the flow: what it says differs over a gap by an order less than x_0."""
    loss = LossConfig(objective="consistency", halve_every=1, halvings=12, teacher=TEACHER_CONFIG)
    objective = Objective.of(diffusion, loss, 256)
    p = objective.process
    sigma = torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=F64)
    t = p.time_at(sigma) if isinstance(p, Continuous) else torch.tensor([10, 30, 60, 90])

    def scale(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(p, Continuous):
            return p.signal_at(t), p.noise_at(t)
        return p.alpha_bar_at(t).sqrt(), (1 - p.alpha_bar_at(t)).sqrt()

    def split(x: torch.Tensor, t: torch.Tensor, exact: bool) -> Prediction:
        a, b = (c.reshape(-1, 1, 1, 1) for c in scale(t))
        gain = S / (a**2 * S**2 + b**2).sqrt() if exact else a * S**2 / (a**2 * S**2 + b**2)
        x_0 = gain * x
        return Prediction(x_0, (x - a * x_0) / b)

    x_0, eps = S * normal(4, 1, 4, 4), normal(4, 1, 4, 4, seed=1)

    def say(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        found = split(x, t, exact=True)
        target = find_target("eps") if isinstance(p, Process) else p.formulation.target
        return target.of(p, found.x_0, x, t, found.eps)

    def measure(step: int) -> torch.Tensor:
        teaching = Teaching(step, lambda x, t: split(x, t, exact=False))
        found: torch.Tensor = objective(say, x_0, t, eps, teaching).weighted
        return found

    wide, narrow = measure(0), measure(8)
    assert (narrow < (0.1 if isinstance(p, Continuous) else 0.6) * wide).all()


def test_a_jump_draws_what_a_gaussian_flow_ends_in() -> None:
    p = take_student(make_process(DiffusionConfig(formulation="edm")), Student("consistency", ""))

    def jump(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        sigma = t.reshape(-1, 1, 1, 1).to(x.dtype)
        x_0 = S / (S**2 + sigma**2).sqrt() * x
        return Prediction(x_0, (x - x_0) / sigma)

    x_T = normal(400, 1, 4, 4).float()
    for steps in (1, 2, 4):
        drawn = draw(p, jump, SamplerConfig(kind="consistency", steps=steps), x_T, make_generator(1), clip=True)
        assert drawn.evaluations.tolist() == [steps] * 400
        assert float(drawn.x_0.std()) == pytest.approx(S, rel=0.03)


def test_the_gap_of_a_pair_is_halved_and_widest_near_the_data() -> None:
    sigma = torch.tensor([0.01, 1.0, 80.0], dtype=F64)
    assert find_gap(sigma, 0).tolist() == [1.0, 1.0, pytest.approx(0.5)]
    later = find_gap(sigma, 6)
    assert (later[:-1] > later[1:]).all()
    torch.testing.assert_close(find_gap(sigma, 7), later / 2)


# ---- What does not go together


def test_mistakes_of_students() -> None:
    def told(loss: dict[str, Any], **more: Any) -> list[str]:
        return problems(**merge(SMALL, {"loss": loss, "needs": NEEDS, **more}))

    four = {"objective": "progressive", "student_steps": 4, **TAUGHT}
    [missing] = problems(**merge(SMALL, {"loss": {**four, "teacher": None}}))
    assert missing.startswith("loss.objective: progressive learns from a teacher, and none is named; set loss.teacher")
    [uneven] = told({**four, "student_steps": 3})
    assert uneven == (
        "loss.student_steps: 3 do not divide diffusion.T = 16 into steps that its teacher can halve; take one of "
        "1, 2, 4, 8"
    )
    assert told({**four, "student_steps": None})[0].startswith("loss.student_steps: missing; progressive makes")
    bound, ode = told(four, evaluation={"nll": {"images": 10}, "ode_nll": {"images": 10}, "fid": None})
    assert "has no bound and no likelihood" in bound and bound.endswith("set it to null") and "ode_nll" in ode
    fid = {"nll": None, "fid": {"sampler": {"kind": "heun", "steps": 4}}}
    [other] = told(four, evaluation=fid)
    assert "heun does not draw from a student of its teacher by progressive in 4 steps; take ddim" in other
    fid = {"nll": None, "fid": {"sampler": {"kind": "ddim", "steps": 2}}}
    [fewer] = told(four, evaluation=fid)
    assert fewer.endswith("take steps: 4 or null, and eta: 0")
    jumps = {"nll": None, "fid": {"sampler": {"kind": "consistency", "steps": 2}}}
    [alone] = problems(**merge(SMALL, {"evaluation": jumps}))
    assert "consistency draws from students alone (loss.objective: consistency)" in alone
    [unread] = problems(**merge(SMALL, {"loss": TAUGHT, "needs": {}}))
    assert unread.startswith("loss.teacher: ") and "without effect on objective: mse" in unread
    [continuous] = told(four, diffusion={"formulation": "edm"}, evaluation={"nll": None, "fid": None})
    assert "progressive halves the steps of a chain" in continuous and continuous.endswith("take consistency")
    [clean] = told({"objective": "consistency", **TAUGHT}, diffusion={"T": 16, "prediction": "x_0"})
    assert "diffusion.prediction: x_0 makes no function that is the identity without noise" in clean


def test_combinations_are_left_out_by_settings_inside_of_sections() -> None:
    space = {
        "loss": {"grid": [{"objective": "mse"}, {"objective": "kl"}]},
        "training.lr": {"grid": [1e-4, 1e-3, 1e-2]},
    }
    left = {"without": [{"loss.objective": "kl", "training.lr": [1e-4, 1e-2]}]}
    found = expand(experiment(search=search(space, **left)))
    assert [(v.trial.loss.objective, v.trial.training.lr) for v in found] == [
        ("mse", 1e-4), ("mse", 1e-3), ("mse", 1e-2), ("kl", 1e-3)
    ]  # fmt: skip
    [unknown] = problems(search=search(space, without=[{"loss.gamma": 1.0}]))
    assert "search.without[0].loss.gamma: not a path of search.space" in unknown


def test_teachers_that_cannot_teach(tmp_path: Path) -> None:
    def told(needs: dict[str, Any], loss: dict[str, Any] | None = None, **more: Any) -> list[str]:
        loss = loss or {"objective": "progressive", "student_steps": 4, **TAUGHT}
        base = {"base": {**NEEDS["base"], **needs}}
        with pytest.raises(ExperimentError) as caught:
            pin_starts(experiment(**merge(SMALL, {"loss": loss, "needs": base, **more})), str(tmp_path))
        return [text.removeprefix("loss.teacher.source: base: ") for text in caught.value.problems]

    assert told({"diffusion": {"formulation": "edm"}}) == [
        "is of diffusion.formulation: edm, and its student of discrete; take the same"
    ]
    assert told({"diffusion.T": 32}) == ["has diffusion.T = 32, and its student 16; take the same"]
    assert told({"diffusion.schedule": {"kind": "linear", "scale": "per_1000"}})[0].startswith("has another noise sch")
    [eps] = told({"diffusion.prediction": "eps"})
    assert eps.startswith("predicts eps, and its student v, which would begin with its weights")
    [small] = told({"model.channels": 4})
    assert "weights do not fit" in small
    [unguided] = told({}, {"objective": "consistency", "teacher": {"source": "base", "guidance": 2.0}})
    assert "guidance: 2 needs a teacher that is told labels" in unguided
    trial = experiment(**merge(SMALL, {"loss": {"objective": "progressive", "student_steps": 4, **TAUGHT}})).trial
    for steps, fits in ((8, True), (2, False)):
        of = trial.model_copy(update={"loss": trial.loss.model_copy(update={"student_steps": steps})})
        source = describe(trial.data)
        assert bool(find_misfits(TEACHER, trial, source, describe_trial(of, source))) is not fits


# ---- From training to its checkpoint


CHAIN = {"objective": "progressive", "student_steps": 2}
GUIDED = {"model": {"labels": True}, "training": {"label_dropout": 0.2}}


@pytest.mark.parametrize(
    ("loss", "guidance", "more"),
    [
        (CHAIN, None, {}),
        (CHAIN, 2.0, GUIDED),
        ({"objective": "consistency"}, None, {}),
        ({"objective": "consistency", "pairs": "noise"}, None, {"diffusion": {"formulation": "edm"}}),
    ],
)
def test_a_student_begins_as_its_teacher_and_its_folder_says_what_it_is(
    tmp_path: Path, loss: dict[str, Any], guidance: float | None, more: dict[str, Any]
) -> None:
    small = {**SMALL, "diffusion": {}} if "diffusion" in more else SMALL
    storage, teacher = Storage(tmp_path), experiment(**merge(small, more)).trial
    dataset = prepare(teacher.data)
    list(train(teacher, dataset, storage, "trials/base"))
    place = f"trials/base/checkpoints/{manifest.name_step(3)}"
    source = {"teacher": {"source": "base@0123456789abcdef", "guidance": guidance}}
    own = merge(merge(small, more), {"loss": {**loss, **source}, "training": {"lr": 1e-12}})
    trial = experiment(**own).trial
    [*_, last] = train(trial, dataset, storage, "trials/student", starts={TEACHER: place})
    assert last.state == "finished" and 0 < last.metrics["valid/teacher_mse"] < 10
    made = manifest.open_committed(storage, f"trials/student/checkpoints/{manifest.name_step(3)}")
    ours, theirs = (checkpoints.load_state(c)[0] for c in (made, manifest.open_committed(storage, place)))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)
    denoiser, process = checkpoints.load(made)
    student = checkpoints.describe(made).student
    assert student and student == process.student and student.teacher == "0123456789abcdef"
    assert student.guidance == guidance
    assert process.describe()["bound"].startswith("no bound: a student of 0123456789abcdef by ")
    assert (2 if student.steps else teacher.diffusion.steps) == process.T
    x_T = torch.randn((2, 1, 8, 8), generator=make_generator(0))
    with pytest.raises(Mistake, match="dpmpp does not draw from a student"):
        draw(process, denoiser, SamplerConfig(kind="dpmpp", steps=2), x_T, make_generator(0), clip=True)
    folder = str(tmp_path / "trials/student/checkpoints" / manifest.name_step(3))
    [subject] = find(folder, storage, ["data.source=digits"], None)
    assert subject.m.evaluation.nll is None and subject.m.T == process.T
    check([subject])
    [wrong] = find(folder, storage, ["data.source=digits", "evaluation.nll={images: 10, timesteps: 2}"], None)
    with pytest.raises(ExperimentError, match="has no bound"):
        check([wrong])


def test_a_trial_may_start_from_several(tmp_path: Path) -> None:
    """From its teacher, from other first weights, and so does its trunk when it has one."""
    needs = {**NEEDS, "first": {"loss": {"objective": "mse", "teacher": None}, "training.steps": 2}}
    more = {"loss": {**CHAIN, **TAUGHT}, "needs": needs, "training": {"init": {"source": "first"}}}
    e = pin_starts(experiment(**merge(SMALL, more)), str(tmp_path))
    rows = list_trials(e)[0]
    digest = describe(e.data).digest
    *needed, student = rows
    first, base = sorted(needed, key=lambda row: rows[row].trial.training.steps)
    assert find_starting_rows(rows, lambda _: digest) == {student: {INIT: first, TEACHER: base}}
    needs = {name: {**overrides, "training.cooldown": 0} for name, overrides in needs.items()}
    cooled = merge(more, {"training": {"cooldown": 1}, "needs": needs})
    rows = list_trials(pin_starts(experiment(**merge(SMALL, cooled)), str(tmp_path)))[0]
    starts = find_starting_rows(rows, lambda _: digest)
    [trunk] = [row for row, variant in rows.items() if variant.role == TRUNK]
    assert starts == {trunk: {INIT: first, TEACHER: base}, [*rows][-1]: {TRUNK: trunk, TEACHER: base}}
