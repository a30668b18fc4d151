"""benchmarks/seeds: two fabricated checkouts with the entry points of the real ones are trained and sampled."""

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from benchmarks.seeds import __main__ as comparison
from benchmarks.seeds import medical_diffusion, worker
from benchmarks.seeds.checkouts import imported, on
from benchmarks.seeds.med_ddpm import MedDdpm
from benchmarks.seeds.medical_diffusion import MedicalDiffusion
from benchmarks.seeds.system import Settings
from benchmarks.seeds.tasks import PaddedSet, Task
from evaluation.data.volume_sets import generated_set
from volumes import DataConfig, IntensityScaling, Volume, VolumeDataset, load_cases, write_volume

MASKED, FREE = (Task("configs/hippocampus", (16, 16, 16), masked, ()) for masked in (True, False))
SHAPE = (9, 12, 7)

TRAINER = """
import copy
import torch
from torch import nn
from torchvision import transforms

class GaussianDiffusion(nn.Module):
    def __init__(self, net, vqgan_ckpt=None, num_frames=0, **settings):
        super().__init__()
        self.net, self.settings, self.vqgan = net, settings, None
        self.image_size, self.num_frames = settings["image_size"], num_frames
        self.weight = nn.Parameter(torch.zeros(()))
    def forward(self, x, condition_tensors=None):
        return ((self.weight - x) ** 2).mean() + 0 * (0 if condition_tensors is None else condition_tensors.sum())
    def sample(self, batch_size, condition_tensors=None):
        if condition_tensors is not None:
            return condition_tensors[:, :1]
        return self.weight.detach() + torch.zeros(1, 1, 16, 16, 16)

class Trainer:
    def __init__(self, diffusion, dataset=None, cfg=None, train_batch_size=1, train_lr=0.0, results_folder="", **other):
        self.model, self.step, self.with_condition = diffusion, 0, other.get("with_condition")
        self.ema_model, self.dl = copy.deepcopy(diffusion), None
        self.opt = torch.optim.Adam(diffusion.parameters(), lr=0.1)
        open("log.txt", "w").close()  # in the working directory, as theirs
    def train(self):
        while True:
            data = next(self.dl)
            if self.with_condition:
                loss = self.model(data["target"].cuda(), condition_tensors=data["input"].cuda())
            else:
                loss = self.model((data["data"] if isinstance(data, dict) else data).cuda())
            loss.backward()
            self.opt.step()
            self.opt.zero_grad()
            self.ema_model.load_state_dict(self.model.state_dict())
            self.step += 1
"""
UNET = """
from torch import nn

def create_model(image_size, num_channels, num_res_blocks, in_channels, out_channels):
    return nn.Conv3d(in_channels, out_channels, 1)

class Unet3D(nn.Conv3d):
    def __init__(self, dim, dim_mults, channels):
        super().__init__(channels, channels, 1)
"""
VQGAN = """
import skvideo.io
import torch
from torch import nn

class LPIPS(nn.Module):
    def __init__(self):
        raise RuntimeError("downloads weights")

class VQGAN(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.perceptual_model = LPIPS()
        self.coder, self.judge = nn.Conv3d(cfg.dataset.image_channels, 1, 1), nn.Conv3d(1, 1, 1)
        assert cfg.model.perceptual_weight == 0 and cfg.model.downsample == [2, 2, 2]
    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (self.coder, self.judge)], []
    def training_step(self, batch, batch_idx, optimizer_idx):
        return (self.judge(self.coder(batch["data"])) ** 2).mean()
"""


@pytest.fixture
def dataset(tmp_path) -> VolumeDataset:
    """Two volumes with an uneven label map."""
    for seed in range(2):
        random = np.random.default_rng(seed)
        image, mask = random.uniform(0, 255, SHAPE), random.integers(0, 3, SHAPE)
        image[0, 0, 0], image[-1, -1, -1] = 0, 255
        for name, array in (("images", image.astype(np.float32)), ("masks", mask.astype(np.int16))):
            (tmp_path / "data" / name).mkdir(exist_ok=True, parents=True)
            write_volume(Volume(array[None], np.eye(4)), tmp_path / f"data/{name}/{seed}.nii.gz")
    config = DataConfig(
        root=str(tmp_path / "data"),
        images="images/{name}.nii.gz",
        masks="masks/{name}.nii.gz",
        label_names={0: "none", 1: "left", 2: "right"},
        intensity=IntensityScaling("window", 0, 255),
        validation_fraction=0,
    )
    return VolumeDataset(load_cases(config), config)


def checkout(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_volume_is_padded_and_restored(dataset):
    volumes = PaddedSet(dataset, (16, 16, 16))
    image = dataset[1]["image"]
    np.testing.assert_array_equal(volumes.restored(volumes.image(1)[0], 1), image[0].numpy())
    assert volumes.image(1).shape == (1, 16, 16, 16) and volumes.image(1)[0, 0].eq(-1).all()
    left, right = (volumes.restored(channel, 1) for channel in volumes.mask(1))
    np.testing.assert_array_equal(1 * (left > 0) + 2 * (right > 0), dataset[1]["mask"].numpy())


def test_med_ddpm_generates_from_the_masks_of_our_volumes(dataset, tmp_path):
    """Its fabricated sampler returns the mask that it is given: voxels of label 1 must be bright where they lie."""
    files = {"diffusion_model/trainer.py": TRAINER, "diffusion_model/unet.py": UNET}
    settings = Settings(tmp_path, checkout(tmp_path / "clone", files))
    system = MedDdpm(dataset, MASKED, settings)
    figures = worker.measure(system, dataset, 0.2, 3, tmp_path / "volumes")
    assert figures["steps"] >= 1 and figures["seconds"] < 5 and figures["peak_mib"] > 0
    assert abs(system.model.weight.item()) > 0 and (tmp_path / "log.txt").exists()
    made, refused = generated_set([tmp_path / "volumes"], dataset.cases, dataset.config)
    assert not refused and made.masks == ["0", "0", "1"]
    for index, mask in ((0, 0), (1, 0), (2, 1)):
        np.testing.assert_array_equal(made.volumes[index][0] > 0.5, dataset[mask]["mask"].numpy() == 1)
    file = nib.load(tmp_path / "volumes/1_0001.nii.gz")
    assert set(np.unique(np.asarray(file.dataobj))) == {0, 255}  # pyright: ignore[reportAttributeAccessIssue]


def test_medical_diffusion_codes_first_and_has_no_masks(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(medical_diffusion, "REQUIRED", ())
    files = {"ddpm/__init__.py": "", "ddpm/diffusion.py": TRAINER + UNET, "vq_gan_3d/model/vqgan.py": VQGAN}
    settings = Settings(tmp_path, checkout(tmp_path / "clone", files))
    system = MedicalDiffusion(dataset, FREE, settings)
    figures = worker.measure(system, dataset, 0.4, 2, tmp_path / "volumes")
    assert figures["steps"] >= 1 and figures["autoencoder_steps"] >= 1
    assert system.model.vqgan is not None
    sidecar = json.loads((tmp_path / "volumes/0_0000.json").read_text())
    assert sidecar["mask"] is None and sidecar["software"] == "medical_diffusion"


def test_modules_of_a_checkout_are_forgotten(tmp_path):
    """Two checkouts have modules of one name; what they need only for pictures may be missing."""
    found = []
    for number in (1, 2):
        folder = checkout(tmp_path / str(number), {"shared/part.py": f"import skvideo.io\nnumber = {number}\n"})
        with imported(folder, ["shared.part"]) as (module,):
            found.append(module.number)
        assert not {"shared.part", "shared"} & set(sys.modules) and str(folder) not in sys.path
    assert found == [1, 2]
    for module, required, said in (
        ("diffusion_model.unet", [], r"has no module diffusion_model\.unet; give the root of the clone"),
        ("shared.part", ["no_such_package"], "pip install no-such-package"),
    ):
        with pytest.raises(ValueError, match=said), imported(tmp_path / "1", [module], required):
            pass


def test_cuda_means_the_device_that_was_asked_for(tmp_path):
    with on("cpu", tmp_path):
        assert torch.zeros(2).cuda().device.type == "cpu" and Path.cwd() == tmp_path.resolve()
    assert Path.cwd() != tmp_path.resolve()


def test_what_a_worker_is_told(tmp_path):
    words = ["--med_ddpm", "clone", "--brains.root", "b", "--minutes", "3", "--width", "32", "--output", "out"]
    options = comparison.parse(words)
    args = comparison.worker_args(options, "med_ddpm", "brains", tmp_path)
    told = worker.parse(args)
    assert (told.checkout, told.root, told.width, told.minutes) == (Path("clone"), Path("b"), 32, 3)
    ours = worker.parse(comparison.worker_args(options, "ours", "brains", tmp_path))
    assert (ours.checkout, ours.width, ours.system) == (None, None, "ours")
