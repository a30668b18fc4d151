"""Small data sets in the layouts that people have, with awkward names."""

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (16, 18, 14)
SPACING = (1.5, 1.5, 2.0)


def affine(spacing=SPACING):
    return np.diag([*spacing, 1.0])


def save(array, path: Path, spacing=SPACING) -> Path:
    """Write a NIfTI file, whatever the case of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine(spacing))
    lower = path.with_name(path.name.replace(".NII.GZ", ".nii.gz"))
    nib.save(image, lower)
    if lower != path:
        lower.rename(path)
    return path


def image(seed: int, shape=SHAPE, kind: str = "mr"):
    """An MR image, or one in HU or SUV, with its mask: two boxes of labels 1 and 2."""
    random = np.random.default_rng(seed)
    values = random.normal(300, 80, shape).clip(1)
    labels = mask(seed, shape)
    values[labels > 0] += 200
    if kind == "ct":
        values = np.where(random.random(shape) < 0.3, -1000, values - 260)
    if kind == "pet":
        values = random.gamma(2, 1.0, shape)
    return values.astype(np.float32)


def mask(seed: int, shape=SHAPE, labels: int = 2):
    array = np.zeros(shape, np.uint8)
    array[3:8, 3:9, 3 : 6 + seed % 3] = 1
    if labels > 1:
        array[9:13, 3:9, 3:9] = 2
    return array


def fork(path: Path) -> None:
    """What macOS leaves beside a file."""
    path.with_name(f"._{path.name}").write_bytes(b"\0\x05\x16\x07" + bytes(100))


def flat(root: Path, count: int = 6, masks: str = "labels", spacing=SPACING, shape=SHAPE) -> Path:
    """images/ and labels/, a name with a space and an umlaut, an upper-case suffix, a twin, an atlas."""
    for n in range(count):
        name = f"Fall {n:02d} Mü" if n % 2 else f"case_{n:02d}"
        file = save(image(n, shape), root / f"images/{name}.nii.gz", spacing)
        save(mask(n, shape), root / f"{masks}/{name}.nii.gz", spacing)
        fork(file)
    save(image(0, shape), root / "images/case_00.nii")
    return root


def pairs(root: Path, count: int = 5) -> Path:
    """One folder: case_image.nii.gz and case_mask.nii.gz."""
    for n in range(count):
        save(image(n), root / f"study-{n}_image.nii.gz")
        save(mask(n, labels=1), root / f"study-{n}_mask.nii.gz")
    return root


def regridded(root: Path, count: int = 5) -> Path:
    """As `pairs`, each mask on a finer grid than its image, of which it shows a part."""
    pairs(root, count)
    for n in range(count):
        save(mask(n, (20, 20, 16), labels=1), root / f"study-{n}_mask.nii.gz", (1.2, 1.35, 1.75))
    return root


def patients(root: Path, count: int = 6, spacing=SPACING) -> Path:
    """A folder per patient with two channels and a mask, and a table of the patients with an odd separator."""
    rows = ["patient;sex;age;note"]
    for n in range(count):
        folder = root / f"Patient {n:02d}ö"
        shape = (16 + 2 * n, 18, 14)
        save(image(n, shape, "ct"), folder / ("CT.nii.gz" if n else "CT.NII.GZ"), spacing)
        fork(save(image(n, shape, "pet"), folder / "PET.nii.gz", spacing))
        save(mask(n, shape, 1), folder / "tumour.nii.gz", spacing)
        (folder / "report.txt").write_text("nothing")
        rows.append(f"Patient {n:02d}ö;{'FM'[n % 2]};{40 + n},5;text {n}")
    (root / "patients.csv").write_text("\n".join(rows))
    return root


def nnunet(root: Path, count: int = 4) -> Path:
    for n in range(count):
        for channel, kind in enumerate(("ct", "pet")):
            save(image(n, kind=kind), root / f"imagesTr/hecktor_{n:03d}_{channel:04d}.nii.gz")
        fork(save(mask(n), root / f"labelsTr/hecktor_{n:03d}.nii.gz"))
    save(image(9), root / "imagesTs/hecktor_900_0000.nii.gz")
    described = {"channel_names": {"0": "CT", "1": "PET"}, "labels": {"background": 0, "GTVp": 1, "GTVn": 2}}
    (root / "dataset.json").write_text(json.dumps({**described, "numTraining": count, "file_ending": ".nii.gz"}))
    return root


def nnunet_v1(root: Path, count: int = 4) -> Path:
    nnunet(root, count)
    described = {"modality": {"0": "CT", "1": "PET"}, "labels": {"0": "background", "1": "GTVp", "2": "GTVn"}}
    (root / "dataset.json").write_text(json.dumps(described))
    return root


def decathlon(root: Path, count: int = 4) -> Path:
    """4-D images, whose fourth axis is the modality."""
    training = []
    for n in range(count):
        both = np.stack([image(n), image(n + 50)], axis=-1)
        fork(save(both, root / f"imagesTr/BRATS_{n:03d}.nii.gz"))
        save(mask(n), root / f"labelsTr/BRATS_{n:03d}.nii.gz")
        training.append({"image": f"./imagesTr/BRATS_{n:03d}.nii.gz", "label": f"./labelsTr/BRATS_{n:03d}.nii.gz"})
    described = {"modality": {"0": "FLAIR", "1": "T1w"}, "labels": {"0": "background", "1": "edema", "2": "core"}}
    (root / "dataset.json").write_text(json.dumps({**described, "training": training}))
    return root


def bids(root: Path, count: int = 5) -> Path:
    """Two sessions of each subject, masks in derivatives, functional series that are not anatomy."""
    rows = ["participant_id\tage\tsex"]
    for n in range(1, count + 1):
        for session in (1, 2):
            name = f"sub-{n:02d}_ses-{session}"
            save(image(n), root / f"sub-{n:02d}/ses-{session}/anat/{name}_T1w.nii.gz")
            save(mask(n), root / f"derivatives/manual/sub-{n:02d}/ses-{session}/anat/{name}_label-lesion_mask.nii.gz")
        save(
            np.zeros((*SHAPE, 12), np.float32), root / f"sub-{n:02d}/ses-1/func/sub-{n:02d}_ses-1_task-rest_bold.nii.gz"
        )
        rows.append(f"sub-{n:02d}\t{30 + n}\t{'MF'[n % 2]}")
    (root / "participants.tsv").write_text("\n".join(rows) + "\n")
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.9.0"}')
    return root


def totalsegmentator(root: Path, count: int = 4) -> Path:
    """ct.nii.gz and segmentations/*.nii.gz, one of them empty everywhere, one lacking in a case, two that overlap."""
    for n in range(count):
        folder = root / f"s{n:04d}"
        save(image(n, kind="ct"), folder / "ct.nii.gz")
        both = mask(n)
        save((both == 1).astype(np.uint8), folder / "segmentations/liver.nii.gz")
        if n:
            spleen = (both == 2).astype(np.uint8)
            spleen[7, 4, 4] = 1  # of the liver, too
            save(spleen, folder / "segmentations/spleen.nii.gz")
        save(np.zeros(SHAPE, np.uint8), folder / "segmentations/aorta.nii.gz")
    return root


def listed(root: Path, count: int = 4, tests: int = 1) -> Path:
    """A table that names files, in folders that say nothing, and the last rows' split: test."""
    rows = ["subject,set,scan,contour,grade"]
    for n in range(count):
        save(image(n), root / f"a/{n * 7919 % 97}.nii.gz")
        save(mask(n), root / f"b/x{n * 31 % 11}.nii.gz")
        split = "test" if n >= count - tests else "train"
        rows.append(f"S{n // 2},{split},a/{n * 7919 % 97}.nii.gz,b\\x{n * 31 % 11}.nii.gz,{n % 2 + 1}")
    (root / "scans.csv").write_text("\n".join(rows))
    return root


def outlined(root: Path, count: int = 5, kind: str = "RTSTRUCT") -> Path:
    """A DICOM tree with masks beside the series: two regions, one of which has another case in a patient, and a PET
    that shows more, in voxels of another size. It is written once for all tests, and copied."""
    shutil.copytree(_outlined(count, kind).name, root, dirs_exist_ok=True)
    return root


@cache
def _outlined(count: int, kind: str) -> tempfile.TemporaryDirectory:
    from structures import on_slice, rtstruct, series_of

    from volumes import Volume

    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    for n in range(count):
        grid, wide = affine((1.5, 1.5, 2.0)), affine((3.0, 3.0, 2.0))
        wide[:3, 3] = [-6, -6, -4]
        drawn = None
        for name, values, place in (
            ("CT", image(n, kind="ct"), grid),
            ("PT", 100 * image(n, (20, 20, 20), "pet"), wide),
        ):
            slices = series_of(Volume(values.astype(np.int16)[None], place), root / f"P {n}/{name} ü")
            for one in slices:
                one.PatientID, one.Modality = f"ID{n}", name
                one.StudyInstanceUID = f"1.2.{n + 1}"
                one.save_as(str(one.filename), enforce_file_format=True)
            drawn = drawn or slices
        assert drawn is not None
        labels, rois = mask(n), {}
        for value, name in ((1, "GTV-1" if n else "gtv-1"), (2, "Node left")):
            x, y, z = (np.flatnonzero((labels == value).any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3))
            (a, b), (c, d) = ((side[0] - 0.4, side[-1] + 0.4) for side in (x, y))
            rois[name] = [on_slice([(a, c), (b, c), (b, d), (a, d)], k, grid) for k in z]
        place = root / f"P {n}/{kind}"
        place.mkdir()
        if kind == "RTSTRUCT":
            rtstruct(drawn, rois).save_as(place / "RS.dcm", enforce_file_format=True)
        else:
            segmentation(drawn, labels, list(rois)).save_as(place / "SEG.dcm")
    return folder


def segmentation(slices, labels: np.ndarray, names: list[str]):
    """A DICOM-SEG of a label map, by highdicom."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    code = hd.AlgorithmIdentificationSequence(name="drawn", version="1", family=codes.DCM.ArtificialIntelligence)
    described = [
        hd.seg.SegmentDescription(
            number, name, codes.SCT.Tissue, codes.SCT.Mass, hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC, code
        )
        for number, name in enumerate(names, 1)
    ]
    # frames in the order of the slices: rows are y from front to back, columns x from right to left
    pixels = np.stack([labels[::-1, ::-1, k].T for k in range(labels.shape[2])])
    return hd.seg.Segmentation(
        slices, pixels, hd.seg.SegmentationTypeValues.BINARY, described, hd.UID(), 1, hd.UID(), 1, "x", "y", "1", "2"
    )


def dicom(root: Path, patients: int = 3, slices: int = 5) -> Path:
    """A tree as an archive packs it: patient, study, series; with a localizer, and a mask beside the series."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    for n in range(patients):
        study = generate_uid()
        for modality, number in (("CT", slices), ("PT", slices), ("CT", 1)):
            series = generate_uid()
            folder = root / f"PAT {n}/{study[-8:]}/{modality}_{series[-6:]}"
            folder.mkdir(parents=True)
            for k in range(number):
                meta = FileMetaDataset()
                meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
                meta.TransferSyntaxUID = ExplicitVRLittleEndian
                one = FileDataset(str(folder / f"IM{k}"), {}, file_meta=meta, preamble=bytes(128))
                one.SOPClassUID, one.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
                one.PatientID, one.PatientSex, one.PatientAge = f"ID{n}", "FM"[n % 2], f"0{40 + n}Y"
                one.StudyInstanceUID, one.SeriesInstanceUID, one.Modality = study, series, modality
                one.SeriesDescription, one.Rows, one.Columns = f"{modality} body", 18, 16
                one.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER" if number == 1 else "AXIAL"]
                one.PixelSpacing, one.ImageOrientationPatient = [1.5, 1.5], [1, 0, 0, 0, 1, 0]
                one.ImagePositionPatient, one.SliceThickness = [0, 0, 2.0 * k], 2.0
                one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 0
                one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
                one.RescaleSlope, one.RescaleIntercept = (1, -1024) if modality == "CT" else (0.001, 0)
                pixels = np.random.default_rng(n * 100 + k).integers(0, 2000 if modality == "CT" else 9000, (18, 16))
                one.PixelData = pixels.astype(np.uint16).tobytes()
                one.save_as(folder / f"IM{k}", enforce_file_format=True)
        grid = np.diag([-1.5, -1.5, 2.0, 1.0])
        nib.save(nib.Nifti1Image(mask(n, (16, 18, slices), 1), grid), root / f"PAT {n}/tumour.nii.gz")
    return root
