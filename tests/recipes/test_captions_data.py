"""Are the pictures what they should be, in splits that share none, and own data read or refused?"""

import csv
import inspect
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from lightning_diag.spelling import locate
from recipes.captions.data import CaptionedImages, CaptionsData, collate
from recipes.captions.glyphs import font_path, glyphs, look_alikes, named_codes
from recipes.captions.samples import SPLITS, Source, split_of
from recipes.captions.vocabulary import END, PADDING, UNKNOWN, Vocabulary, caption_words

CONF = Path(__file__).parents[2] / "conf"
GLYPHS = 5573
DIGEST = "53fed9b96564b622c8aef7442c119f887d32e9435baa9da66e0db31df4680153"
WIRED = {
    "data": {"batch_size", "num_workers", "pin_memory", "seed"},
    "model": {
        *("optimizer", "component_lrs"),
        *("channels", "image_size", "vocabulary_size", "max_words"),
    },
}


@pytest.fixture(scope="module")
def source() -> Source:
    return glyphs(32)


@pytest.fixture(scope="module")
def data() -> CaptionsData:
    data = CaptionsData(batch_size=16)
    data.setup("fit")
    return data


def by_name(source, name):
    (found,) = [sample for sample in source.samples if sample.caption == name]
    return found


# ---- glyphs ----


def test_the_glyphs_are_those_that_were_counted(source):
    assert len(source.samples) == GLYPHS
    assert source.digest == DIGEST
    assert {sample.image.dtype for sample in source.samples} == {torch.uint8}
    assert {tuple(sample.image.shape) for sample in source.samples} == {(1, 32, 32)}
    assert all(sample.image.any() for sample in source.samples)
    captions = [sample.caption for sample in source.samples]
    assert len(set(captions)) == GLYPHS


def test_a_newer_unicode_cannot_add_a_glyph():
    """What the font has and Unicode 14 does not name is for private use, and stays nameless."""
    codes = named_codes(font_path())
    assert len(codes) == 5575
    with_name = set(codes)
    from fontTools.ttLib import TTFont

    for code in set(TTFont(str(font_path())).getBestCmap()) - with_name:
        category = unicodedata.category(chr(code))
        assert category[0] in "MZC"
        assert category != "Cn", hex(code)


def test_pictures_show_what_they_are_called(source):
    """With a tolerance: another version of Pillow may shift a pixel by some grey levels."""
    full = by_name(source, "FULL BLOCK").image.float()
    assert full.mean() > 100
    line = by_name(source, "VERTICAL LINE").image[0].float()
    columns = line.mean(dim=0)
    assert 14 <= int(columns.argmax()) <= 17
    assert (columns > 20).sum() <= 4
    rows, columns = (by_name(source, "LATIN CAPITAL LETTER L").image[0] > 80).nonzero(as_tuple=True)
    assert rows.mode().values >= rows.max() - 1
    assert columns.mode().values <= columns.min() + 1
    small = by_name(source, "FULL STOP").image.float()
    assert 0 < small.mean() < 10


def test_larger_pictures_show_the_same_in_the_same_splits(source):
    larger = glyphs(64)
    assert larger.digest == source.digest
    assert [sample.group for sample in larger.samples] == [x.group for x in source.samples]
    small, large = (by_name(one, "LATIN CAPITAL LETTER E").image[0] for one in (source, larger))
    assert large.shape == (64, 64)
    assert large.double().mean().item() == pytest.approx(small.double().mean().item(), rel=0.1)
    for axis in (0, 1):
        centres = [
            (x.double().sum(axis) * torch.arange(len(x))).sum() / x.double().sum() / len(x)
            for x in (small, large)
        ]
        assert float(centres[0]) == pytest.approx(float(centres[1]), abs=0.03)


def test_what_looks_the_same_shares_a_group(source):
    names = (
        "LATIN CAPITAL LETTER A",
        "GREEK CAPITAL LETTER ALPHA",
        "CYRILLIC CAPITAL LETTER A",
    )
    assert {by_name(source, name).group for name in names} == {"U+0041"}
    other = by_name(source, "LATIN CAPITAL LETTER B").group
    assert other == "U+0042"
    nearly = "LATIN CAPITAL LETTER E WITH DIAERESIS", "CYRILLIC CAPITAL LETTER IO"
    assert len({by_name(source, name).group for name in nearly}) == 1


def test_look_alikes_are_those_of_all_pairs():
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(0, 250, (30, 1, 8, 8), generator=generator, dtype=torch.uint8)
    pictures = torch.cat([base, base[:10] + 1, base[5:12] + 3, base[:10] + 2])
    found = look_alikes(pictures)
    flat = pictures.flatten(1).double().numpy()
    distance = np.sqrt(((flat[:, None] - flat) ** 2).mean(axis=2))
    near = distance < 2.0
    reach = np.linalg.matrix_power(near.astype(float), 8) > 0
    assert found == [int(row.argmax()) for row in reach]
    assert found[30] == 0
    assert found[40] == 5  # three levels away: alike through what lies between
    assert found[45] == 45  # three levels away, and nothing between


def test_no_picture_is_in_two_splits(data):
    images = {
        split: {image.numpy().tobytes() for image in data.datasets[split].images}
        for split in SPLITS
    }
    assert not images["train"] & images["val"]
    assert not images["train"] & images["test"]
    assert not images["val"] & images["test"]
    train = data.datasets["train"].images.flatten(1).float()
    test = data.datasets["test"].images.flatten(1).float()
    assert torch.cdist(test, train).min() > 2.0 * 32
    assert data.fingerprint["samples"] == {"train": 4453, "val": 538, "test": 582}
    assert sum(data.fingerprint["samples"].values()) == GLYPHS


def test_the_splits_do_not_depend_on_the_seed(data):
    other = CaptionsData(seed=7)
    state = torch.get_rng_state()
    other.setup("fit")
    assert torch.equal(torch.get_rng_state(), state)
    assert other.fingerprint == data.fingerprint
    assert other.datasets["val"].captions == data.datasets["val"].captions
    orders = [next(iter(one.train_dataloader())).tokens for one in (data, other)]
    assert not torch.equal(*(order[:, :2] for order in orders))
    again = next(iter(data.train_dataloader())).tokens
    assert torch.equal(orders[0], again)


# ---- words ----


def test_the_vocabulary_knows_the_training_split_alone(data):
    words = set(data.vocabulary.words[3:])
    count: dict[str, int] = {}
    for caption in data.datasets["train"].captions:
        for word in caption.lower().replace("-", " ").split():
            count[word] = count.get(word, 0) + 1
    assert words == {word for word, times in count.items() if times >= 2}
    held_out = {w for c in data.datasets["test"].captions for w in caption_words(c)}
    assert held_out - words
    index = next(
        i
        for i, c in enumerate(data.datasets["test"].captions)
        if not set(caption_words(c)) <= words
    )
    assert UNKNOWN in data.datasets["test"].tokens[index]


def test_the_commonest_words_are_kept():
    vocabulary = Vocabulary.of(["b a", "a c", "A-b"], size=5)
    assert vocabulary.words == ["<pad>", "<unk>", "<end>", "a", "b"]
    assert len(Vocabulary.of(["b a", "a c"], size=9, min_count=2)) == 4
    assert vocabulary.encode("c B a", max_words=2) == [UNKNOWN, 4, END]


@given(st.lists(st.sampled_from(["letter", "a", "with", "acute"]), max_size=12))
def test_captions_come_back(words):
    vocabulary = Vocabulary(["a", "acute", "letter", "with"])
    ids = vocabulary.encode(" ".join(words), max_words=12)
    assert vocabulary.decode([*ids, PADDING, PADDING]) == " ".join(words)


def test_a_batch_is_padded_to_its_longest_caption(data):
    rows = CaptionedImages(glyphs(32).samples[:3], data.vocabulary, max_words=16)
    batch = collate([rows[i] for i in range(3)])
    assert [rows.captions[i] for i in range(3)] == [
        *("EXCLAMATION MARK", "QUOTATION MARK", "NUMBER SIGN")
    ]
    assert batch.image.dtype == torch.float32
    assert torch.equal((batch.image * 255).round().to(torch.uint8), rows.images)
    short = collate([(rows.images[0], torch.tensor([5, END])), (rows.images[1], rows.tokens[1])])
    assert short.tokens.shape == (2, 3)
    assert short.tokens[0].tolist() == [5, END, PADDING]


def test_a_checkpoint_of_other_words_is_refused(data):
    state = data.state_dict()
    data.load_state_dict(state)
    with pytest.raises(ValueError, match=r"must have the vocabulary of the data .* got another"):
        data.load_state_dict({"words": state["words"][:-1]})


# ---- own data ----


@pytest.fixture
def folder(tmp_path):
    """Sixty coloured pictures, the last of which repeats the first."""
    generator = np.random.default_rng(0)
    (tmp_path / "images" / "deep").mkdir(parents=True)
    names = []
    for i in range(59):
        pixels = generator.integers(0, 255, (10, 12, 3), dtype=np.uint8)
        names.append(f"deep/{i}.png" if i % 2 else f"{i}.png")
        Image.fromarray(pixels).save(tmp_path / "images" / names[-1])
    names.append("again.png")
    (tmp_path / "images" / "again.png").write_bytes((tmp_path / "images" / "0.png").read_bytes())
    rows = [{"file": name, "caption": f"Picture {i % 5}, noise"} for i, name in enumerate(names)]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return tmp_path


def own(folder, **more):
    data = CaptionsData(path=str(folder), image_size=16, batch_size=4, **more)
    data.setup("fit")
    return data


def test_own_pictures(folder):
    data = own(folder, channels=3)
    assert data.datasets["train"].images.shape[1:] == (3, 16, 16)
    assert sum(data.fingerprint["samples"].values()) == 60
    assert data.fingerprint["name"] == folder.name
    assert "picture" in data.vocabulary.words
    everything = torch.cat([dataset.images for dataset in data.datasets.values()])
    assert len(everything.unique(dim=0)) == 59
    per_split = sum(len(dataset.images.unique(dim=0)) for dataset in data.datasets.values())
    assert per_split == 59
    assert own(folder).datasets["train"].images.shape[1:] == (1, 16, 16)


def test_csv_says_the_same_as_json(folder):
    before = own(folder)
    rows = [json.loads(line) for line in (folder / "captions.jsonl").open() if line.strip()]
    (folder / "captions.jsonl").unlink()
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["caption", "other", "file"], restval="x")
        writer.writeheader()
        writer.writerows(rows)
    assert own(folder).fingerprint == before.fingerprint


def test_another_pixel_is_another_fingerprint(folder):
    before = own(folder).fingerprint["sha256"]
    with Image.open(folder / "images" / "0.png") as image:
        Image.eval(image, lambda level: 255 - level).save(folder / "images" / "0.png")
    assert own(folder).fingerprint["sha256"] != before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: the line must be one JSON object, "),
        ("[1]", "line 1: the line must be a JSON object, got list."),
        ('{"file": "0.png"}', "line 1: the line must have `caption`, it has `file`."),
        ("{}", "line 1: the line must have `file`, it has nothing."),
        (
            '{"file": "0.png", "caption": " "}',
            "line 1: `caption` must be text that is not blank, got ' '.",
        ),
        ('{"file": 3, "caption": "a"}', "`file` must be text that is not blank, got 3."),
        (
            '{"file": "none.png", "caption": "a"}',
            "line 1: `file` must name a picture in images/, got none.png.",
        ),
        (
            '{"file": "../captions.jsonl", "caption": "a"}',
            "line 1: `file` must lie inside images/, got ../captions.jsonl.",
        ),
        ('{"file": "text.png", "caption": "a"}', "line 1: text.png must be a picture, "),
        ("", "captions.jsonl: the file must hold at least one caption, it is empty."),
        (
            '{"file": "0.png", "caption": "a"}',
            "Each split must get a picture, by a hash of the pictures, got ",
        ),
    ],
)
def test_own_data_that_break_a_rule(folder, line, message):
    (folder / "images" / "text.png").write_text("no picture")
    (folder / "captions.jsonl").write_text(line)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        own(folder)


def test_folders_that_hold_too_little_or_too_much(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="`path` must be a folder that holds images/, got "):
        own(tmp_path / "none")
    (folder / "captions.csv").write_text("file,caption\n")
    with pytest.raises(ValueError, match=r"either captions\.jsonl or captions\.csv, got both in "):
        own(folder)
    (folder / "captions.csv").unlink()
    (folder / "captions.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"or captions\.csv, got neither in "):
        own(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 4}, "`image_size` must be at least 8, got 4."),
        ({"max_words": 0}, "`max_words` must be at least 1, got 0."),
        ({"vocabulary_size": 3}, "`vocabulary_size` must be at least 4, got 3."),
        ({"min_count": 0}, "`min_count` must be at least 1, got 0."),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0."),
        ({"channels": 3}, "`channels` must be 1, since glyphs are grey, got 3."),
        ({"channels": 2, "path": "x"}, "`channels` must be 1 or 3, got 2."),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CaptionsData(**arguments)


# ---- configuration ----


@pytest.mark.parametrize("group", WIRED)
def test_the_yaml_repeats_the_arguments_and_their_defaults(group):
    written = OmegaConf.to_container(OmegaConf.load(CONF / group / "captions.yaml"), resolve=False)
    made = locate(written.pop("_target_"))
    taken = inspect.signature(made).parameters
    assert list(written) == list(taken)
    for name in set(written) - WIRED[group]:
        assert written[name] == taken[name].default, name
    for name in WIRED[group]:
        assert written[name].startswith("${"), name


def test_the_split_of_a_group_is_a_hash():
    counts = [sum(split_of(str(i)) == split for i in range(20_000)) for split in SPLITS]
    assert counts == pytest.approx([16_000, 2_000, 2_000], abs=200)
