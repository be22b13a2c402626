"""The three kinds of page, each made with one word in every place."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch

import comparisons
import lorakit
import models
from lorakit.core.table import Table
from lorakit.study.analysis import page as analysis_page
from lorakit.study.analysis.measures import analyze, similarities
from lorakit.study.analysis.report import Study
from lorakit.study.comparison import page as comparison_page
from lorakit.training import page as run_page
from lorakit.training.changes import Change
from lorakit.training.report import Evaluation, Sample
from lorakit.training.tried import Trial, Tried


def run(word: str) -> str:
    samples = (Sample(word, word, word, word),)
    return run_page.render(
        title=word,
        facts={word: word},
        command=word,
        settings=Table(("setting", "value"), ((word, word),)),
        summary=word,
        history=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2, "eval_loss": 1.0}],
        result=Evaluation(1, word, {word: (0.0, 1.0)}, samples, (True,)),
        changes=[Change(word, 0.5, 1.0)],
        tried=Tried(word, (Trial(word, 2, 1.5, 1.0), Trial("other", 2, math.inf, math.inf, word))),
    )


def comparison(word: str) -> str:
    task = replace(
        comparisons.SST,
        name=word,
        source=word,
        kind=word,
        metrics=(word,),
        chosen_by=word,
        published={word: {word: 1.0}},
    )
    row = replace(comparisons.row(word, word, 10, {word: (1.0, 0.5)}), tried={1e-4: 1.0})
    return comparison_page.render(
        replace(
            comparisons.COMPARISON,
            model=word,
            tasks=(task, replace(task, name="other")),
            rows=(row,),
            left_out=((word, word, word),),
            machine={word: word},
        )
    )


def analysis(word: str) -> str:
    model = models.llama()
    lorakit.attach(model, ["q_proj"], rank=2)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    adapter = lorakit.extract(model)
    modules = tuple(replace(module, name=f"{word}.{i}") for i, module in enumerate(analyze(adapter, model)))
    alike = tuple(replace(one, name=f"{word}.{i}") for i, one in enumerate(similarities(adapter, adapter)))
    return analysis_page.render(Study(word, word, modules, word, alike, (word,)))


PAGES: dict[str, Callable[[str], str]] = {"run": run, "comparison": comparison, "analysis": analysis}
