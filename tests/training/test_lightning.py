"""Lightning on models that lorakit adapted: checkpoints without the base, from which a run goes on exactly.

Lightning does not keep random states, so the models here have no dropout and the rows come in one order.
"""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lorakit
import models

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),  # of torch, about Lightning's own code
    pytest.mark.filterwarnings("ignore:Found 2 module.s. in eval mode"),  # attach froze their statistics
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
SCORES = [0.1, 0.9, 0.4, 0.2]  # of the epochs


def module_of(library: Any, adapted: bool = True) -> Any:
    """A module whose base has an adapter that takes from the weight, and whose own head has statistics."""

    class Classifier(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.base = models.conv_net().train()
            if adapted:
                lorakit.attach(self.base, ["conv_pw", "6"], rank=2, init="pissa")
            torch.manual_seed(1)
            self.head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.head(self.base(batch[0])), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("score", SCORES[min(self.current_epoch, 3)])

        def configure_optimizers(self) -> Any:
            learnt = [value for value in self.parameters() if value.requires_grad]
            optimizer = torch.optim.AdamW(learnt, lr=0.05)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]

    return Classifier()


def batches() -> Any:
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.rand(3, 9, 9, generator=generator), index % 3) for index in range(8)]
    return torch.utils.data.DataLoader(rows, batch_size=4)  # type: ignore[arg-type]


def trainer_of(folder: Path, library: Any = lightning, epochs: int = 4, *more: Any, **settings: Any) -> Any:
    return library.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[lorakit.LightningCallback(), *more],
        **settings,
    )


def keeping(folder: Path, **settings: Any) -> ModelCheckpoint:
    usual: dict[str, Any] = dict(dirpath=folder, filename="{epoch}", monitor="score", mode="max", save_top_k=-1)
    return ModelCheckpoint(**(usual | settings))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def in_file(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = torch.load(path, weights_only=False)
    return read


@pytest.mark.parametrize("library", [lightning, pytorch_lightning], ids=lambda library: library.__name__)
def test_a_run_that_goes_on_equals_one_that_nothing_stopped(library: Any, tmp_path: Path) -> None:
    whole = module_of(library)
    before = state(whole)
    trainer = trainer_of(tmp_path / "whole", library, enable_checkpointing=False)
    trainer.fit(whole, batches(), batches())

    stopped = trainer_of(tmp_path / "stopped", library, epochs=2, enable_checkpointing=False)
    stopped.fit(module_of(library), batches(), batches())
    stopped.save_checkpoint(tmp_path / "two.ckpt")
    resumed = module_of(library)
    going_on = trainer_of(tmp_path / "resumed", library, enable_checkpointing=False)
    going_on.fit(resumed, batches(), batches(), ckpt_path=tmp_path / "two.ckpt", weights_only=False)
    assert same(state(resumed), state(whole)) and not same(state(whole), before)
    assert not same(state(stopped.lightning_module), state(whole))
    moments = [made.optimizers[0].state_dict()["state"] for made in (going_on, trainer)]
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[1])


@pytest.mark.parametrize("weights_only", [False, True])
def test_no_base_weight_is_in_a_checkpoint(weights_only: bool, tmp_path: Path) -> None:
    module = module_of(lightning)
    begun = state(module)
    trainer = trainer_of(tmp_path, lightning, 2, keeping(tmp_path, save_weights_only=weights_only))
    trainer.fit(module, batches(), batches())
    trainer.save_checkpoint(tmp_path / "after.ckpt", weights_only)
    moved = {name for name, value in state(module).items() if not torch.equal(value, begun[name])}
    constant = {name for name in begun if name.rpartition(".")[2].startswith("lora_")} - moved  # PiSSA's A₀ and B₀
    for name in ("epoch=0.ckpt", "epoch=1.ckpt", "after.ckpt"):
        found = in_file(tmp_path / name)
        assert set(found["state_dict"]) == moved | constant
        assert ("optimizer_states" in found) is not weights_only
    assert not any("lora_" not in name and name.startswith("base.") for name in found["state_dict"])


def test_the_best_adapter_is_loaded(tmp_path: Path) -> None:
    after: dict[int, dict[str, Tensor]] = {}

    class Noting(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            after[trainer.current_epoch] = state(pl_module)

    module = module_of(lightning)
    trainer = trainer_of(tmp_path, lightning, 4, keeping(tmp_path, save_top_k=1), Noting())
    trainer.fit(module, batches(), batches())
    assert same(state(module), after[3]) and not same(after[3], after[1])
    trainer.validate(module, batches(), ckpt_path="best", weights_only=False, verbose=False)
    assert same(state(module), after[1])
    fresh = module_of(lightning)  # in another process there is the file alone
    trainer_of(tmp_path, lightning, 4, keeping(tmp_path)).validate(
        fresh, batches(), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=False, verbose=False
    )
    assert same(state(fresh), after[1])


def test_a_whole_checkpoint_is_taken_and_one_that_lacks_a_trained_tensor_is_not(tmp_path: Path) -> None:
    module = module_of(lightning)
    trainer = trainer_of(tmp_path, epochs=1, enable_checkpointing=False)
    trainer.fit(module, batches(), batches())
    expected = state(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    found = in_file(tmp_path / "a.ckpt")
    torch.save({**found, "state_dict": expected}, tmp_path / "whole.ckpt")
    other = module_of(lightning)
    trainer_of(tmp_path).validate(
        other, batches(), ckpt_path=tmp_path / "whole.ckpt", weights_only=False, verbose=False
    )
    assert same(state(other), expected)

    lacking = {name: value for name, value in found["state_dict"].items() if name != "base.6.lora_A"}
    torch.save({**found, "state_dict": lacking}, tmp_path / "lacking.ckpt")
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"base\.6\.lora_A\"\. *$"):
        trainer_of(tmp_path).validate(module_of(lightning), batches(), ckpt_path=tmp_path / "lacking.ckpt")


def test_what_the_callback_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lorakit.LoraError, match=r"Classifier has no adapter\. Call lorakit\.attach"):
        trainer_of(tmp_path).fit(module_of(lightning, adapted=False), batches(), batches())
    whole = SimpleNamespace(strategy=SimpleNamespace(restore_checkpoint_after_setup=True))
    with pytest.raises(lorakit.LoraError, match="SimpleNamespace writes checkpoints of the whole model"):
        lorakit.LightningCallback().setup(whole, None, "fit")


def test_a_layer_that_does_nothing_stops_the_run_in_its_first_step(tmp_path: Path) -> None:
    module = module_of(lightning)
    module.base[6].forward = nn.Linear(6, 4).forward  # it does not compute with its own weight
    before = state(module)
    with pytest.raises(lorakit.LoraError, match="1 adapted layers of Classifier do nothing"):
        trainer_of(tmp_path).fit(module, batches(), batches())
    assert all(torch.equal(value, before[name]) for name, value in state(module).items() if "head.0" not in name)


def test_without_the_library_the_name_is_there_and_says_what_to_install() -> None:
    script = """
import sys
for name in ("lightning", "pytorch_lightning", "transformers", "accelerate"):
    sys.modules[name] = None
from lorakit import *
try:
    LightningCallback()
except LoraError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    said = 'LightningCallback needs Lightning, which is not installed: pip install "lightning>=2.6.4"\n'
    assert done.stdout == said, done.stderr
