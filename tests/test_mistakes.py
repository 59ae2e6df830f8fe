"""The mistakes of an experiment file: all of them at once, each with its path and what to do."""

import math
from typing import Any

import pytest
from conftest import sent
from experiment_files import content, digests, experiment, problems, search

from orchestrator.experiment.expand import expand
from orchestrator.experiment.load import parse
from orchestrator.experiment.records import ExperimentError
from orchestrator.experiment.settings import merge
from workers.config import count_sub_batches

# ---- Mistakes


def test_all_mistakes_are_told_at_once_each_with_its_path() -> None:
    wrong = content(
        name="../x",
        data={"held_out": 2},
        difusion={"T": 5},
        diffusion={"T": 0, "beta_end": 0.1, "schedule": {"kind": "cosin", "beta_start": 1.0, "beta_end": "0.02"}},
        model={"multipliers": [1, "x"], "attention": 3, "channels": None},
        loss=None,
        training={"steps": 1e5, "lr": math.inf, "batch_size": True},
        evaluation={"nll": {"images": "most", "timesteps": 0}},
        search={
            "metric": "train/loss",
            "scheduler": {"kind": "ahsa"},
            "samples": 0,
            "space": {
                "diffusion.T": {"grid": [50, 0, "x"]},
                "diffusion.t": {"grid": [50]},
                "training.lr": {"uniform": [2, 1]},
                "training.steps": {"uniform": [1, 10]},
                "diffusion.schedule": {"grid": [{"kind": "linear", "beta_end": 2}, {"kin": 4}, 5]},
                "seed": [1, 2],
                "loss.weighting": {"grid": []},
                "loss.gamma": {"gird": [3], "loguniform": [0, 1], "uniform": [1]},
                "training.workers": {"grid": [1, 2]},
                "model.dropout": {"grid": [0.1], "choice": [0.1]},
            },
        },
        tracking={"uri": 5},
    )
    with pytest.raises(ExperimentError) as caught:
        parse(wrong)
    told = dict(problem.split(": ", 1) for problem in caught.value.problems)
    assert all(told[path].startswith(text) or text in told[path] for path, text in EXPECTED.items()), told
    assert set(told) == set(EXPECTED)
    assert str(caught.value).splitlines()[0] == f"the experiment: {len(EXPECTED)} mistakes"
    assert len(str(caught.value).splitlines()) == len(EXPECTED) + 1
    assert str(sent(caught.value)) == str(caught.value)


EXPECTED = {
    "name": "'../x' is to be the name of a folder below the storage root: 1 to 100 of the letters A to",
    "data.held_out": "2 is not a number above 0 and below 1",
    "difusion": "unknown key; did you mean 'diffusion'?",
    "diffusion.T": "0 is not a whole number of at least 1 and at most 100,000",
    "diffusion.beta_end": "unknown key; did you mean 'diffusion.schedule.beta_end'?",
    "diffusion.schedule.kind": "'cosin' is not one of linear, quadratic, constant, jsd, warmup10, warmup50, cosine, "
    "sigmoid, list, log_snr; did you mean 'cosine'?",
    "diffusion.schedule.beta_start": "1.0 is not a number above 0 and below 1",
    "diffusion.schedule.beta_end": "'0.02' is not a number above 0 and below 1",
    "model.multipliers[1]": "'x' is not a whole number",
    "model.attention": "3 is not a list of values, each a whole number",
    "model.channels": "null is not a whole number of at least 1 and at most 8,192",
    "loss": "null is not a section with the keys objective, weighting, gamma",
    "training.steps": "100000.0 is not a whole number of at least 1 and at most 1,000,000,000; write 100000",
    "training.lr": "Infinity is not a finite number above 0",
    "training.batch_size": "true is not a whole number of at least 1 and at most 65,536",
    "evaluation.nll.images": "'most' is not 'all' or a whole number of at least 1",
    "evaluation.nll.timesteps": "0 is not 'all' or a whole number of at least 2",
    "search.metric": "across weightings, targets or T; valid: eval/nll_bpd, eval/density_bpd, eval/fid, "
    "eval/fd_classifier",
    "search.scheduler.kind": "'ahsa' is not one of none, asha, median; did you mean 'asha'?",
    "search.samples": "0 is an empty search",
    "search.space.diffusion.T.grid[1]": "0 is not a whole number of at least 1",
    "search.space.diffusion.T.grid[2]": "'x' is not a whole number of at least 1",
    "search.space.diffusion.t": "no such setting of a trial; did you mean 'diffusion.T'?",
    "search.space.training.lr.uniform": "[2.0, 1.0] is reversed; write [1.0, 2.0]",
    "search.space.training.steps.uniform[0]": "1.0 is not a whole number of at least 1 and",
    "search.space.training.steps.uniform[1]": "10.0 is not a whole number of at least 1 and",
    "search.space.diffusion.schedule.grid[0].beta_end": "2 is not a number above 0 and below 1",
    "search.space.diffusion.schedule.grid[1].kin": "unknown key; did you mean 'kind'?",
    "search.space.diffusion.schedule.grid[2]": "5 is not a section with the keys kind, beta_start, beta_end, scale",
    "search.space.seed": "write {grid: [1, 2]} to try each",
    "search.space.loss.weighting.grid": "[] is an empty search",
    "search.space.loss.gamma.gird": "unknown key; did you mean 'grid'?",
    "search.space.loss.gamma.loguniform": "[0.0, 1.0] has no logarithm at 0.0",
    "search.space.loss.gamma.uniform": "[1] is not a range [low, high] of numbers",
    "search.space.training.workers": "does not change what is trained",
    "search.space.model.dropout": "takes exactly one of grid, choice, uniform, loguniform, int_uniform",
    "tracking.uri": "5 is not text or null; put it in quotes",
}


def test_what_is_missing_is_told_with_what_it_is() -> None:
    with pytest.raises(ExperimentError) as caught:
        parse({"data": {}, "training": {}})
    assert caught.value.problems == [
        "data.source: missing; it is text",
        "training.steps: missing; it is a whole number of at least 1 and at most 1,000,000,000",
        "name: missing; it is text",
    ]


@pytest.mark.parametrize("name", ["", ".x", "a/b", "..", "a..b", "a b", "x\n", "\u00e4", "a" * 101, "a\\b", "~"])
def test_names_stay_inside_the_storage_root(name: str) -> None:
    (problem,) = problems(name=name)
    assert "storage root" in problem


@pytest.mark.parametrize("batch_size", [1, 6, 8, 100, 128, 129])
def test_workers_share_whole_sub_batches(batch_size: int) -> None:
    assert count_sub_batches(batch_size) == math.gcd(batch_size, 8)
    for workers in range(1, 10):
        training = {"batch_size": batch_size, "workers": workers}
        if count_sub_batches(batch_size) % workers == 0:
            assert batch_size % experiment(training=training).training.workers == 0
        else:
            assert "training.workers" in problems(training=training)[0]


@pytest.mark.parametrize("gpus", ["auto", 0, 1, 0.25, 0.01, 0.99])
def test_a_trial_takes_no_gpu_one_or_a_part_of_one(gpus: Any) -> None:
    assert experiment(training={"gpus": gpus}).training.gpus == gpus


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {"gpus": 1.5},
            "training.gpus: 1.5 is not auto, 0, 1 or a part of a GPU such as 0.25; a worker uses at most one",
        ),
        ({"gpus": 2}, "a worker uses at most one GPU; for more take training.workers"),
        ({"gpus": -1}, "a worker uses at most one GPU; for more take training.workers"),
        ({"gpus": -0.5}, "a worker uses at most one GPU; for more take training.workers"),
        ({"gpus": 0.001}, "0.001 is not one of auto, 0, 1 or a number of at least 0.01 and below 1"),
        ({"gpus": "atuo"}, "did you mean 'auto'?"),
        (
            {"gpus": 0.5, "workers": 2},
            "NCCL, by which the workers of a trial exchange gradients, refuses two of them on",
        ),
        ({"gpus": 0.5, "workers": 2}, "take gpus: 1, or workers: 1"),
    ],
)
def test_more_than_a_gpu_and_parts_that_cannot_be_are_refused_with_what_to_do(training: Any, message: str) -> None:
    (problem,) = problems(training=training)
    assert problem.startswith("training.gpus: ") and message in problem


def sampler(**settings: Any) -> dict[str, Any]:
    return {"evaluation": {"fid": {"sampler": settings}}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"diffusion": {"schedule": {"beta_start": 0.03}}}, "diffusion.schedule.beta_start: 0.03 is above beta_end"),
        ({"diffusion": {"T": 50}, "evaluation": {"nll": {"timesteps": 51}}}, "51 is more than diffusion.T = 50"),
        ({"diffusion": {"T": 5}, "evaluation": {"fid": {"sampler": {"steps": 6}}}}, "6 is more than diffusion.T = 5"),
        (
            sampler(eta=0.5),
            "without effect on kind: ancestral, which reads steps; leave it out, or take kind: ddim",
        ),
        (sampler(kind="heun", eta=0.5), "without effect on kind: heun"),
        (sampler(kind="ode", steps=20), "steps: 20 is without effect on kind: ode, which reads tolerance"),
        (sampler(kind="heun", tolerance=0.1), "take kind: ode"),
        (sampler(kind="dpmpp", repeats=2), "take kind: langevin"),
        (sampler(kind="langevin", steps=2000), "2000 is more than diffusion.T = 1000"),
        (sampler(kind="heun", steps=1001), "1001 is more than diffusion.T = 1000"),
        ({**sampler(kind="ode"), "diffusion": {"prediction": "mu"}}, "prediction: mu has none; take heun or dpmpp"),
        (
            {"evaluation": {"ode_nll": {}}, "diffusion": {"prediction": "mu"}},
            "evaluation.ode_nll: asks for eps between",
        ),
        ({**sampler(kind="dpmpp"), "diffusion": {"schedule": {"kind": "jsd"}}}, "jsd begins at sigma_T = inf"),
        ({"evaluation": {"ode_nll": {}}, "diffusion": {"schedule": {"kind": "jsd"}}}, "ends at sigma_T = inf"),
    ],
)
def test_settings_that_do_not_go_together(sections: dict[str, Any], message: str) -> None:
    (problem,) = problems(**sections)
    assert message in problem


UNREAD = [
    ({"diffusion": {"schedule": {"kind": "cosine", "beta_end": 0.5}}}, "diffusion.schedule.beta_end: 0.5",
     "kind: cosine"),
    ({"loss": {"gamma": 3.0}}, "loss.gamma: 3.0", "weighting: simple"),
    ({"loss": {"objective": "kl", "p2_k": 2.0}}, "loss.p2_k: 2.0", "weighting: simple"),
    ({"loss": {"vlb_weight": 0.1}}, "loss.vlb_weight: 0.1", "objective: mse"),
    ({"evaluation": {"nll": {"proposal": "uniform"}}}, "evaluation.nll.proposal: uniform", "timesteps: all"),
    ({"search": {"batch": 4}}, "search.batch: 4", "algorithm: grid"),
    ({"search": {"scheduler": {"grace": 5}}}, "search.scheduler.grace: 5", "kind: none"),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "what", "on"), UNREAD, ids=[what for _, what, _ in UNREAD])
def test_a_setting_that_nothing_reads_is_refused_in_every_section(sections: Any, what: str, on: str) -> None:
    (problem,) = problems(**sections)
    assert problem.startswith(f"{what} is without effect on {on}") and "leave it out, or take" in problem


def test_a_setting_that_some_variant_reads_is_taken() -> None:
    """The variants that do not read it are one and the same trial."""
    space = {"loss.weighting": {"grid": ["simple", "min_snr"]}, "loss.gamma": {"grid": [1.0, 3.0]}}
    found, (warning,) = digests(expand(experiment(search=search(space))))
    assert len(found) == 3 and "differ from it only in loss.gamma" in warning
    assert experiment(loss={"gamma": 3.0}, search=search({"loss.weighting": space["loss.weighting"]}))
    (problem,) = problems(search=search({"loss.gamma": space["loss.gamma"]}))
    assert problem.startswith("search.space.loss.gamma: any value is without effect on weighting: simple; leave it")


def test_a_disagreement_of_some_variants_names_them() -> None:
    (problem,) = problems(
        evaluation={"nll": {"timesteps": 60}},
        search=search({"diffusion.T": {"grid": [50, 100]}, "loss.weighting": {"grid": ["simple", "vlb"]}}),
    )
    assert problem.endswith("(2 of 4 variants; first: diffusion.T=50, loss.weighting='simple')")


T_GRID = {"diffusion.T": {"grid": [50, 100]}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"search": search(T_GRID), "evaluation": {"nll": None}},
            "eval/nll_bpd is not measured, as evaluation.nll is null; take another",
        ),
        (
            {"search": search(T_GRID, metric="eval/fd_classifier"), "evaluation": {"fid": None}},
            "eval/fd_classifier is not measured, as evaluation.fid is null; take another",
        ),
        (
            {"search": search(T_GRID, metric="eval/fid")},
            "eval/fid is not measured; these settings of evaluation.fid make eval/fd_classifier",
        ),
        (
            {"evaluation": {"precision": "bf16", "ode_nll": {}}},
            "evaluation.precision: bf16 is too coarse for the error control of evaluation.ode_nll; take float32",
        ),
        (
            {"evaluation": {"precision": "tf32", "fid": {"sampler": {"kind": "ode"}}}},
            "evaluation.precision: tf32 is too coarse for the error control of evaluation.fid.sampler; take float32",
        ),
        ({"search": search(T_GRID, samples=3)}, "search.samples: 3 is without effect"),
        ({"search": search(T_GRID, algorithm="random", samples=3)}, "nothing to draw"),
        ({"search": search({"diffusion.T": {"choice": [5, 6]}})}, "set search.algorithm: random"),
        ({"search": search({"diffusion.T": {"choice": [5]}}, algorithm="random")}, "search.samples: missing"),
        ({"search": search({"seed": {"grid": list(range(10_001))}})}, "10,001 variants are more than 10,000"),
        ({"search": search({**T_GRID, "diffusion": {"grid": [{"T": 5}]}})}, "sets what search.space.diffusion.T sets"),
        ({"search": search({"training.cpus": {"grid": [1, 2]}})}, "does not change what is trained"),
    ],
)
def test_searches_that_make_no_sense(sections: dict[str, Any], message: str) -> None:
    (problem,) = problems(**sections)
    assert message in problem


def test_a_single_trial_needs_no_metric() -> None:
    experiment(evaluation={"nll": None, "fid": None})


# ---- What goes together ----------------------------------------------------------------------------------------


LEARNED = {"diffusion": {"variance": "learned_range"}}
TOGETHER = [
    (LEARNED, "diffusion.variance: learned_range is not trained by loss.objective: mse"),
    ({"loss": {"objective": "hybrid"}}, "loss.objective: hybrid adds the bound to teach a variance"),
    ({"loss": {"objective": "kl", "weighting": "p2"}}, "loss.weighting: p2 is without effect on objective: kl"),
    ({**LEARNED, "loss": {"objective": "hybrid", "weighting": "vlb"}}, "loss.weighting: vlb weighs t by a fixed"),
    ({"diffusion": {"prediction": "mu"}, "training": {"precision": "bf16"}}, "training.precision: bf16 has not"),
    ({"diffusion": {"schedule": {"betas": [0.1]}}}, "betas: [0.1] is without effect on kind: linear"),
    ({"diffusion": {"schedule": {"kind": "list"}}}, "one value for each of diffusion.T = 1000 timesteps; given: 0"),
    ({"diffusion": {"T": 2, "schedule": {"kind": "list", "betas": [0.1, 1.0]}}}, "betas: [1.0] must lie between 0"),
    ({"diffusion": {"schedule": {"kind": "log_snr", "log_snr_end": 9.5}}}, "log_snr_start: 9 is not above log_snr_end"),
    ({"diffusion": {"schedule": {"kind": "sigmoid", "beta_start": 0.5}}}, "beta_start: 0.5 is above beta_end = 0.02"),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "text"), TOGETHER, ids=[text[:40] for _, text in TOGETHER])
def test_what_does_not_go_together_is_refused_with_the_reason_and_the_fix(sections, text):
    with pytest.raises(ExperimentError) as caught:
        parse(merge(content(), sections))
    [problem] = caught.value.problems
    assert text in problem and any(
        word in problem for word in ("take ", "leave ", "swap ", "needs ", "between ", "reversed")
    )


@pytest.mark.parametrize(
    "sections",
    [
        {**LEARNED, "loss": {"objective": "kl"}},
        {**LEARNED, "loss": {"objective": "hybrid", "weighting": "min_snr"}},
        {"diffusion": {"variance": "learned"}, "loss": {"objective": "kl"}},
        {"loss": {"objective": "kl"}},
        {"diffusion": {"prediction": "mu"}},
        {"diffusion": {"T": 2, "schedule": {"kind": "list", "betas": [0.1, 0.9]}}},
    ],
)
def test_what_goes_together_is_taken(sections):
    assert parse(merge(content(), sections))


# ---- Continuous time

EDM = {
    "diffusion": {"formulation": "edm"},
    "evaluation": {"nll": {"timesteps": 20}, "fid": {"sampler": {"kind": "heun", "steps": 9}}},
    "search": {"metric": "eval/continuous_nll_bpd"},
}


@pytest.mark.parametrize(
    ("changes", "path", "text"),
    [
        ({"diffusion": {"T": 100}}, "diffusion.T", "100 is without effect on formulation: edm"),
        ({"diffusion": {"schedule": {"kind": "cosine"}}}, "diffusion.schedule", "or take formulation: discrete"),
        ({"diffusion": {"prediction": "v"}}, "diffusion.prediction", "v is without effect"),
        ({"diffusion": {"variance": "learned"}}, "diffusion.variance", "learned is without effect"),
        ({"diffusion": {"t_law": "logit_normal"}}, "diffusion.t_law", "or take formulation: flow"),
        ({"diffusion": {"sigma_min": 90.0}}, "diffusion.sigma_min", "90 is not below sigma_max = 80"),
        (
            {"diffusion": {"sigma_max": 1e6}},
            "diffusion.sigma_max",
            "nothing like it; take one of 0.00022 to 4e",
        ),
        ({"loss": {"objective": "kl"}}, "loss.objective", "take objective: mse, with weighting: vlb"),
        ({"training": {"timesteps": "importance"}}, "training.timesteps", "take antithetic or stratified or uniform"),
        ({"evaluation": {"nll": {"timesteps": "all"}}}, "evaluation.nll.timesteps", "give a number"),
        ({"evaluation": {"variance": "fixed_small"}}, "evaluation.variance", "the process is continuous; leave it out"),
        (
            {"evaluation": {"fid": {"sampler": {"kind": "ddim"}}}},
            "evaluation.fid.sampler.kind",
            "take churn or dpmpp",
        ),
        ({"evaluation": {"fid": {"sampler": {"steps": None}}}}, "evaluation.fid.sampler.steps", "give a number"),
        ({"search": {"metric": "eval/nll_bpd"}}, "search.metric", "whose bound is eval/continuous_nll_bpd"),
    ],
)
def test_a_continuous_process_has_no_steps(changes: dict[str, Any], path: str, text: str) -> None:
    assert experiment(**EDM).trial.diffusion.steps is None
    told = dict(problem.split(": ", 1) for problem in problems(**merge(EDM, changes)))
    assert list(told) == [path] and text in told[path], told


def test_a_chain_has_no_sampler_of_real_times() -> None:
    (problem,) = problems(evaluation={"fid": {"sampler": {"kind": "euler", "steps": 5}}})
    assert "euler follows real times, and there are diffusion.T = " in problem and "take ancestral or ddim" in problem
    (problem,) = problems(search={"metric": "eval/continuous_nll_bpd"})
    assert problem.startswith("search.metric") and "whose bound is eval/nll_bpd" in problem
