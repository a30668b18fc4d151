"""The label values of MAISI's ControlNets for CT, by name.

The list is NVIDIA's (label_dict.json of NV-Generate-CTMR, Apache-2.0); the 132 values are those of its segmentation
networks, of which MAISI never saw 2, 16, 18, 20, 21 and 129 to 131. They are no labels here, so that a mask which has
them is refused by name.
"""

from collections.abc import Sequence

BODY = 200  # all of the body that is no labeled structure; no segmentation network writes it


def _sided(*names: str) -> list[str]:
    """Return each structure on the left, and on the right."""
    return [f"{side} {name}" for name in names for side in ("left", "right")]


def _numbered(first: int, names: Sequence[str]) -> dict[int, str]:
    return dict(enumerate(names, start=first))


_SPINE = [
    *(f"L{n}" for n in range(5, 0, -1)),
    *(f"T{n}" for n in range(12, 0, -1)),
    *(f"C{n}" for n in range(7, 0, -1)),
]
LABELS: dict[int, str] = {
    0: "background",
    1: "liver",
    **_numbered(3, ["spleen", "pancreas", "right kidney", "aorta", "inferior vena cava"]),
    **_numbered(8, ["right adrenal gland", "left adrenal gland", "gallbladder", "esophagus", "stomach", "duodenum"]),
    14: "left kidney",
    15: "bladder",
    17: "portal vein and splenic vein",
    19: "small bowel",
    **_numbered(22, ["brain", "lung tumor", "pancreatic tumor", "hepatic vessel", "hepatic tumor"]),
    27: "colon cancer primaries",
    **_numbered(28, ["left lung upper lobe", "left lung lower lobe"]),
    **_numbered(30, [f"right lung {part} lobe" for part in ("upper", "middle", "lower")]),
    **_numbered(33, [f"vertebrae {name}" for name in _SPINE]),
    57: "trachea",
    **_numbered(58, _sided("iliac artery", "iliac vena")),
    62: "colon",
    **_numbered(63, [f"{side} rib {n}" for side in ("left", "right") for n in range(1, 13)]),
    **_numbered(87, _sided("humerus", "scapula", "clavicula", "femur", "hip")),
    97: "sacrum",
    **_numbered(98, _sided("gluteus maximus", "gluteus medius", "gluteus minimus", "autochthon", "iliopsoas")),
    108: "left atrial appendage",
    109: "brachiocephalic trunk",
    **_numbered(110, _sided("brachiocephalic vein", "common carotid artery")),
    114: "costal cartilages",
    115: "heart",
    **_numbered(116, _sided("kidney cyst")),
    **_numbered(118, ["prostate", "pulmonary vein", "skull", "spinal cord", "sternum"]),
    **_numbered(123, _sided("subclavian artery")),
    **_numbered(125, ["superior vena cava", "thyroid gland", "vertebrae S1", "bone lesion"]),
    132: "airway",
    BODY: "body",
}
