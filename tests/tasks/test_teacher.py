"""A phase that learns from another: same batches, the student's weights alone, the same however a batch is cut."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import models
from models.family import Batch, InputError
from tasks import bundle, jobs, train
from tasks.engine import distributed, loop
from tests.tasks import toy_animals
from tests.tasks import toy_training as toy

HERE = distributed.Place(torch.device("cpu"))
PHASE = models.load("wildlife").phases["distill"]


class Student(nn.Module):
    """Repeats what a teacher says."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, batch: Batch) -> Batch:
        y = self.layer(batch["x"])
        return {"loss": (y - batch["teacher_y"]).square().mean()} if self.training else {"y": y}


def learn(work: Path, teacher: nn.Module, **settings: object) -> dict[str, Tensor]:
    task = replace(toy.build_task(Student), teach=partial(train.taught, teacher))
    loop.fit(task, toy.settings(**settings), HERE, work, lambda metrics, step: None)
    return toy.last_weights(work)


def test_the_engine_hands_over_what_the_teacher_says(tmp_path: Path) -> None:
    torch.manual_seed(9)
    teacher = Student().eval().requires_grad_(False)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    whole = learn(tmp_path / "a", teacher, epochs=25, lr=0.05, weight_decay=0.0)
    assert whole.keys() == {"layer.weight", "layer.bias"}
    for key, value in before.items():
        assert torch.equal(teacher.state_dict()[key], value)
        torch.testing.assert_close(whole[key], value, atol=0.02, rtol=0)
    pieces = learn(tmp_path / "b", teacher, epochs=25, lr=0.05, weight_decay=0.0, micro_batch=3)
    for key, value in whole.items():
        torch.testing.assert_close(pieces[key], value, atol=1e-5, rtol=0)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> jobs.Job:
    """The distillation of a project whose other phase is there."""
    monkeypatch.chdir(tmp_path)
    toy_animals.write_project(tmp_path)
    shutil.rmtree(tmp_path / "artifacts/wildlife/distill")
    settings = toy.settings(epochs=1, micro_batch=4)
    return jobs.Job("wildlife", "distill", PHASE, PHASE.tiny, settings, "animals", toy_animals.FACTS)


def test_a_student_is_a_bundle_of_its_own(job: jobs.Job) -> None:
    train.train(job, HERE, lambda metrics, step: None)
    student, teacher = bundle.load(job.out), bundle.load(Path("artifacts/wildlife/finetune"))
    assert student.state.keys() == PHASE.build(PHASE.tiny, toy_animals.FACTS).state_dict().keys()
    size = {each.phase: sum(value.numel() for value in each.state.values()) for each in (student, teacher)}
    assert size["distill"] < size["finetune"] / 2
    meta = json.loads((job.out / "bundle.json").read_text())
    assert meta["teacher"]["phase"] == "finetune"
    assert len(meta["teacher"]["sha256"]) == 64
    assert "train_loss_species_teacher" in (job.out / "history.csv").read_text()


def test_another_teacher_is_another_run(job: jobs.Job) -> None:
    """Resume state is keyed by the teacher's weights, too."""
    origins = []
    for seed in (0, 1):
        toy_animals.write_bundle(Path("artifacts/wildlife/finetune"), "finetune", seed)
        teacher = train.find_teacher(job)
        assert teacher is not None
        origins.append({"teacher": bundle.storage.file_digest(teacher.path)})
    assert train.work_folder(job, origins[0]) != train.work_folder(job, origins[1])


def test_a_teacher_that_cannot_teach_is_one_line(job: jobs.Job) -> None:
    with pytest.raises(InputError, match="knows other classes"):
        train.find_teacher(replace(job, facts=replace(job.facts, labels={**job.facts.labels, "species": ["cat"]})))
    video = replace(PHASE.tiny.model.video_encoder, frame_size=32)
    larger = replace(PHASE.tiny, model=replace(PHASE.tiny.model, video_encoder=video))
    with pytest.raises(InputError, match=r"makes frames \(2, 3, 32, 32\) of a clip and its teacher takes"):
        train.find_teacher(replace(job, config=larger))
    shutil.rmtree("artifacts/wildlife/finetune")
    with pytest.raises(InputError, match="train the phase"):
        train.find_teacher(job)
