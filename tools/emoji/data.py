"""Converts three npm packages to arrays: every concept drawn in two styles at 64x64 on white, with its words."""

import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image


# The packages are pinned: the weights, the contact sheet and the credits in NOTICE belong to these versions.
NOTO = "emoji-datasource-google@16.0.0"
FLUENT = "@lobehub/fluent-emoji-3d@1.1.0"
WORDS = "emojibase-data@17.0.0"

# Words that ask for a style, in the order in which the two drawings of a concept are stored.
STYLES = ("flat", "3d")

IMAGE_SIZE = 64
GROUPS = ("animal", "plant", "food", "face")

# The emojibase tags that name the thing drawn, selected by hand. Most tags are associations ("bat": vampire, "potato":
# couch), and a bat drawn for "vampire" would be unexpected.
KEYWORDS = frozenset((Path(__file__).parent / "keywords.txt").read_text().split())


@dataclass(frozen=True)
class Concept:
    """A thing that is drawn twice.

    Attributes:
        caption: Its name in lower case, such as `"dog face"`; unique.
        keywords: Other words that mean this concept and no other one in the dataset.
        group: One of [`GROUPS`].
    """

    caption: str
    keywords: list[str]
    group: str


def pack(package: str, folder: Path) -> Path:
    """Returns the package's tarball in `folder`, fetched with `npm pack` unless it is already there."""
    name, version = package.removeprefix("@").replace("/", "-").rsplit("@", 1)
    tarball = folder / f"{name}-{version}.tgz"
    if not tarball.exists():
        if shutil.which("npm") is None:
            raise FileNotFoundError(
                f"{tarball} does not exist and npm is not installed: install npm or copy the file there."
            )
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return tarball


def group_of(subgroup: str) -> str | None:
    """Maps an emojibase subgroup to one of [`GROUPS`]; `None` if this dataset leaves it out."""
    if subgroup.startswith("animal-"):
        return "animal"
    if subgroup.startswith("plant-"):
        return "plant"
    if subgroup.startswith("food-") or subgroup in ("drink", "dishware"):
        return "food"
    if subgroup.startswith("face-") or subgroup in ("cat-face", "monkey-face"):
        return "face"
    return None


def join_key(hexcode: str) -> str:
    """Normalizes a hexcode: the three packages disagree on case and on the variation selector."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def plain(words: str) -> str:
    """Converts to lower case and ASCII quotes, as a user types."""
    return words.lower().replace("’", "'").replace("“", "").replace("”", "")


def read_drawings(tarball: Path, prefix: str, suffix: str) -> dict[str, bytes]:
    """Reads the encoded images under `prefix`, keyed by [`join_key`] of their file name."""
    drawings = {}
    with tarfile.open(tarball) as archive:
        for member in archive:
            if member.name.startswith(prefix) and member.name.endswith(suffix):
                file = archive.extractfile(member)
                if file is not None:
                    drawings[join_key(Path(member.name).stem)] = file.read()
    return drawings


def on_white(encoded: bytes) -> np.ndarray:
    """Decodes an image with transparency to `(64, 64, 3)` uint8 on white."""
    drawing = Image.open(io.BytesIO(encoded)).convert("RGBA")
    # Composite before resizing: the hidden color of transparent pixels would bleed into the outline.
    image = Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB")
    # Pad to a square, in case a vendor's image is not one.
    side = max(image.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS))


def build_dataset(packages: Path) -> tuple[list[Concept], np.ndarray]:
    """Joins the three packages by hexcode.

    Returns:
        The concepts, sorted by caption, and their drawings `(len(concepts), len(STYLES), 64, 64, 3)` uint8.
    """
    with tarfile.open(pack(WORDS, packages)) as archive:
        emojis = json.load(archive.extractfile("package/en/data.json"))  # type: ignore[arg-type]
        meta = json.load(archive.extractfile("package/meta/groups.json"))  # type: ignore[arg-type]
    vendors = [
        read_drawings(pack(NOTO, packages), "package/img/google/64/", ".png"),
        read_drawings(pack(FLUENT, packages), "package/assets/", ".webp"),
    ]

    found = {}
    for emoji in emojis:
        group = group_of(meta["subgroups"].get(str(emoji.get("subgroup")), ""))
        key = join_key(emoji["hexcode"])
        if group is not None and all(key in drawings for drawings in vendors):
            found[plain(emoji["label"])] = (group, [plain(tag) for tag in emoji.get("tags", [])], key)

    # A keyword is used only if it names a single concept: count the concepts of each.
    uses: dict[str, int] = {}
    for _, tags, _ in found.values():
        for tag in set(tags):
            uses[tag] = uses.get(tag, 0) + 1

    concepts, drawings = [], []
    for caption, (group, tags, key) in sorted(found.items()):
        keywords = [tag for tag in tags if tag in KEYWORDS and uses[tag] == 1 and tag not in found]
        concepts.append(Concept(caption, keywords, group))
        drawings.append([on_white(vendor[key]) for vendor in vendors])
    return concepts, np.array(drawings, dtype=np.uint8)


def load_dataset(work_dir: Path) -> tuple[list[Concept], np.ndarray]:
    """Returns the result of [`build_dataset`], cached in `work_dir`."""
    arrays, words = work_dir / "images.npy", work_dir / "concepts.json"
    if not (arrays.exists() and words.exists()):
        concepts, images = build_dataset(work_dir / "packages")
        words.write_text(json.dumps([asdict(concept) for concept in concepts], indent=1))
        np.save(arrays, images)
    return [Concept(**entry) for entry in json.loads(words.read_text())], np.load(arrays)
