"""Short videos that are made up, with questions about them: coloured shapes that move over natural backgrounds.

    seed ──draw──▶ Scene: things, when and where ──render──▶ frames
                     └────────ask────────▶ questions whose answers follow from it

Some answers are in any frame (colour, shape, count), some only in the order of frames (direction, order, change,
speed, event). About what is not there the answer is that one can't tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from ..calib.questions import Question
from .backgrounds import Backgrounds
from .ground import NOTHING, Sight
from .samples import Sample

COLOURS = {
    "red": (214, 34, 40),
    "green": (32, 158, 58),
    "blue": (36, 76, 214),
    "yellow": (246, 212, 40),
    "purple": (136, 44, 168),
    "white": (242, 242, 242),
    "orange": (250, 128, 16),
    "pink": (250, 150, 196),
    "brown": (116, 70, 34),
    "gray": (128, 128, 128),
    "cyan": (48, 206, 214),
}
TESTED = ("red", "green", "blue", "yellow", "purple", "white")  # other colours are for training only
SHAPES = ("circle", "square", "triangle", "star", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
STAYS = "stays"
WORDS = (tuple(COLOURS), SHAPES, (*DIRECTIONS, STAYS))  # that name a thing
BACKWARDS = np.array([1, 0, 3, 2, 4, NOTHING])  # what the last group's are when time runs backwards
NUMBERS = ("zero", "one", "two", "three", "four")
UNKNOWN = "I can't tell."
SPLITS = ("train", "validation", "test")
VIDEO_SHARE = 0.4  # of backgrounds, from videos
EMPTY_SHARE = 0.04  # of scenes, without things
RADII = (0.09, 0.14)  # of the frame's side
FASTER = 2.2  # times as fast, at least
MOVING = 0.75  # of a crowd
CLIP = 4  # frames


def pairs(split: str) -> list[tuple[str, str]]:
    """Colours and shapes that go together in a split: of every five pairs of TESTED colours three, one and one. All
    TESTED colours and all shapes are in each. In training other colours go with every shape, or a shape could be told
    by its colour there, wrongly elsewhere."""
    taken = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}[split]
    return [
        (colour, shape)
        for i, colour in enumerate(COLOURS)
        for j, shape in enumerate(SHAPES)
        if ((i + j) % len(SHAPES) in taken if colour in TESTED else split == "train")
    ]


@dataclass(frozen=True)
class Thing:
    """
    Attributes:
        start, velocity: of its centre, in sides of the frame, and sides over the whole video; x to the right, y down.
        radius: in sides of the frame.
        appears, disappears: when it can be seen, from 0, the first frame, to 1, behind the last.
    """

    colour: str
    shape: str
    start: tuple[float, float] = (0.5, 0.5)
    velocity: tuple[float, float] = (0.0, 0.0)
    radius: float = RADII[0]
    appears: float = 0.0
    disappears: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def direction(self) -> str | None:
        """None if it stays."""
        return next((name for name, way in DIRECTIONS.items() if np.dot(way, self.velocity) > 0), None)

    @property
    def words(self) -> tuple[int, ...]:
        """One of each group of WORDS, by number."""
        said = (self.colour, self.shape, self.direction or STAYS)
        return tuple(group.index(word) for group, word in zip(WORDS, said, strict=True))

    @property
    def speed(self) -> float:
        return float(np.hypot(*self.velocity))

    def at(self, time: float) -> tuple[float, float]:
        return self.start[0] + self.velocity[0] * time, self.start[1] + self.velocity[1] * time


@dataclass(frozen=True)
class Scene:
    plot: str
    things: tuple[Thing, ...]


def draw(random: np.random.Generator, split: str) -> Scene:
    """A scene of a random plot; its things never touch."""
    if random.random() < EMPTY_SHARE:
        return Scene("empty", ())
    name = str(random.choice(list(PLOTS)))
    things = _arranged(random, split, PLOTS[name])
    return Scene(name, tuple(things[i] for i in random.permutation(len(things))))


def _arranged(random: np.random.Generator, split: str, plot: Plot) -> list[Thing]:
    chosen = _chosen(random, split, int(random.integers(plot.fewest, plot.most + 1)))
    while True:
        things = plot.arrange(random, [replace(thing, start=_place(random, thing.radius)) for thing in chosen])
        if not _touch(things):
            return things


def _chosen(random: np.random.Generator, split: str, count: int) -> list[Thing]:
    """Things whose colours and shapes all differ."""
    allowed, chosen = pairs(split), list[Thing]()
    for i in random.permutation(len(allowed)):
        colour, shape = allowed[i]
        if all(colour != thing.colour and shape != thing.shape for thing in chosen):
            chosen.append(Thing(colour, shape, radius=random.uniform(*RADII)))
    return chosen[:count]


def _place(random: np.random.Generator, margin: float) -> tuple[float, float]:
    x, y = random.uniform(margin, 1 - margin, 2)
    return float(x), float(y)


def _moving(random: np.random.Generator, thing: Thing, distance: float) -> Thing:
    """Moves so far in one of four directions, and stays within the frame."""
    x, y = DIRECTIONS[str(random.choice(list(DIRECTIONS)))]
    first = thing.radius + random.random() * (1 - 2 * thing.radius - distance)
    along = first if x + y > 0 else 1 - first
    across = random.uniform(thing.radius, 1 - thing.radius)
    start = (along, across) if x else (across, along)
    return replace(thing, start=start, velocity=(x * distance, y * distance))


def _move(random: np.random.Generator, things: list[Thing]) -> list[Thing]:
    return [_moving(random, things[0], random.uniform(0.4, 0.65)), *things[1:]]


def _race(random: np.random.Generator, things: list[Thing]) -> list[Thing]:
    fast = random.uniform(0.5, 0.7)
    slow = fast / random.uniform(FASTER, 3.5)
    return [_moving(random, things[0], fast), _moving(random, things[1], slow)]


def _follow(random: np.random.Generator, things: list[Thing]) -> list[Thing]:
    first, second = random.uniform(0.1, 0.3), random.uniform(0.55, 0.85)
    return [replace(things[0], appears=first), replace(things[1], appears=second)]


def _change(random: np.random.Generator, things: list[Thing]) -> list[Thing]:
    when, appears = random.uniform(0.35, 0.7), random.random() < 0.5
    changing = replace(things[0], appears=when) if appears else replace(things[0], disappears=when)
    return [changing, *things[1:]]


def _stand(random: np.random.Generator, things: list[Thing]) -> list[Thing]:
    return things


def _mill(random: np.random.Generator, things: list[Thing]) -> list[Thing]:
    return [_moving(random, t, random.uniform(0.2, 0.65)) if random.random() < MOVING else t for t in things]


@dataclass(frozen=True)
class Plot:
    """
    Attributes:
        fewest, most: things.
        arrange: makes things that stand somewhere do what the plot says.
    """

    fewest: int
    most: int
    arrange: Callable[[np.random.Generator, list[Thing]], list[Thing]]


PLOTS = {
    "move": Plot(1, 2, _move),
    "race": Plot(2, 2, _race),
    "follow": Plot(2, 2, _follow),
    "change": Plot(1, 2, _change),
    "stand": Plot(1, 4, _stand),
}
CROWD = Plot(2, 4, _mill)


def _touch(things: list[Thing]) -> bool:
    times = np.linspace(0, 1, 17)
    return any(
        np.hypot(*(np.array(a.at(time)) - b.at(time))) < 1.15 * (a.radius + b.radius)
        for i, a in enumerate(things)
        for b in things[:i]
        for time in times
    )


# -- pictures ----------------------------------------------------------------------------------------------------------


def render(scene: Scene, backgrounds: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Draws the things over uint8 (N, S, S, 3) RGB; returns new frames."""
    out = backgrounds.copy()
    for number, frame in enumerate(out):
        for thing, centre in _seen(scene, number, len(out)):
            _paint(frame, thing, centre)
    return out


def _seen(scene: Scene, number: int, frames: int) -> list[tuple[Thing, tuple[float, float]]]:
    """The things in a frame of so many, and where."""
    time, middle = number / max(frames - 1, 1), (number + 0.5) / frames
    return [(thing, thing.at(time)) for thing in scene.things if thing.appears <= middle < thing.disappears]


def _paint(frame: NDArray[np.uint8], thing: Thing, centre: tuple[float, float]) -> None:
    side, fine = frame.shape[0], 16
    points = (_outline(thing.shape) * thing.radius + centre) * side
    polygon = np.round(points * fine).astype(np.int32)
    cv2.fillPoly(frame, [polygon], COLOURS[thing.colour], cv2.LINE_AA, shift=4)
    cv2.polylines(frame, [polygon], True, (20, 20, 20), max(1, side // 112), cv2.LINE_AA, shift=4)


def _outline(shape: str) -> NDArray[np.float64]:
    """Corners within the unit circle."""
    if shape == "cross":
        a, b = 0.32, 0.92
        corners = [(a, b), (a, a), (b, a), (b, -a), (a, -a), (a, -b), (-a, -b), (-a, -a), (-b, -a), (-b, a), (-a, a)]
        return np.array([*corners, (-a, b)])
    count, turn = {"circle": (48, 0.0), "square": (4, 0.5), "triangle": (3, 0.0), "star": (10, 0.0)}[shape]
    angles = (np.arange(count) + turn) / count * 2 * np.pi
    radii = np.where(np.arange(count) % 2, 0.42, 1.0) if shape == "star" else np.ones(count)
    return np.stack([np.sin(angles), -np.cos(angles)], 1) * radii[:, None]


# -- questions ---------------------------------------------------------------------------------------------------------


def ask(scene: Scene, random: np.random.Generator, most: int) -> tuple[Question, ...]:
    """At most so many of those that the scene answers, the rarer kinds first; now and then one that it does not."""
    asked = [_unanswerable(scene, random)] if not scene.things or random.random() < 0.15 else []
    possible = _answerable(scene, random)
    kinds = [question.kind for question in possible]
    order = sorted(random.permutation(len(possible)), key=lambda i: RARITY[kinds[i]])
    asked += [possible[i] for i in order]
    return tuple(asked[:most])


def _answerable(scene: Scene, random: np.random.Generator) -> list[Question]:
    out = []

    def add(kind: str, answer: str, *texts: str) -> None:
        out.append(Question(kind, str(random.choice(texts)), answer))

    things = scene.things
    for thing in things:
        name = thing.name
        add("colour", thing.colour, f"What color is the {thing.shape}?", f"Which color does the {thing.shape} have?")
        add("shape", thing.shape, f"What shape is the {thing.colour} object?", f"Which shape is {thing.colour}?")
        if thing.direction:
            add("direction", thing.direction, f"Which way does the {name} move?", f"Where does the {name} move to?")
        if scene.plot == "change":
            change = "appears" if thing.appears > 0 else "disappears" if thing.disappears < 1 else STAYS
            add("change", change, f"Does the {name} appear, disappear or stay?")
    if scene.plot == "stand":
        add("count", NUMBERS[len(things)], "How many objects are there?", "How many shapes can you see?")
    if scene.plot == "follow":
        one, other = random.permutation([thing.name for thing in things])
        first = min(things, key=lambda thing: thing.appears).name
        add("order", first, f"Which appears first, the {one} or the {other}?", f"What comes first, {one} or {other}?")
    if scene.plot == "race":
        one, other = random.permutation([thing.name for thing in things])
        fastest = max(things, key=lambda thing: thing.speed).name
        add("speed", fastest, f"Which moves faster, the {one} or the {other}?", f"Which is faster, {one} or {other}?")
    add("event" if things else "unknown", _event(scene), "What happens?", "What happens in the video?")
    return out


def _event(scene: Scene) -> str:
    moving = sorted((thing for thing in scene.things if thing.direction), key=lambda thing: -thing.speed)
    if moving:
        return ", ".join(f"the {thing.name} moves {thing.direction}" for thing in moving).capitalize() + "."
    if scene.plot == "follow":
        first, second = sorted(scene.things, key=lambda thing: thing.appears)
        return f"The {first.name} appears, then the {second.name}."
    if scene.plot == "change":
        (changing,) = (thing for thing in scene.things if thing.appears > 0 or thing.disappears < 1)
        return f"The {changing.name} {'appears' if changing.appears > 0 else 'disappears'}."
    return "Nothing moves." if scene.things else UNKNOWN


def describe(scene: Scene) -> Question:
    """Asks for all things at once, from left to right as they stand at first."""
    names = [f"a {thing.name}" for thing in sorted(scene.things, key=lambda thing: thing.start)]
    return Question("description", "What can you see?", f"{', '.join(names)}.".capitalize() if names else UNKNOWN)


def _unanswerable(scene: Scene, random: np.random.Generator) -> Question:
    """About something that is not there."""
    colours = sorted(set(COLOURS) - {thing.colour for thing in scene.things})
    shapes = sorted(set(SHAPES) - {thing.shape for thing in scene.things})
    colour, shape = random.choice(colours), random.choice(shapes)
    texts = (
        f"What color is the {shape}?",
        f"What shape is the {colour} object?",
        f"Which way does the {colour} {shape} move?",
    )
    return Question("unknown", str(random.choice(texts)), UNKNOWN)


RARITY = dict.fromkeys(("order", "speed", "count", "change"), 0) | dict.fromkeys(("direction", "event"), 1)
RARITY |= dict.fromkeys(("colour", "shape"), 2) | {"unknown": 3}


def sample(
    seed: int, split: str, backgrounds: Backgrounds, frames: int = 8, fps: float = 2.0, size: int = 224, most: int = 4
) -> Sample:
    """The video of a seed, and at most so many questions. In training backgrounds are varied, and the first question
    asks for a description: of one video it tells most, though as a whole it is seldom right.

    Raises:
        ValueError: an unknown split.
    """
    seeds = SPLITS.index(split), seed
    random = np.random.default_rng(seeds)
    scene = draw(random, split)
    shown = _shown(scene, random, split, backgrounds, frames, fps, size)
    described = (describe(scene),) if split == "train" else ()
    return Sample(shown, fps, described + ask(scene, np.random.default_rng((*seeds, 1)), most - len(described)))


def sight(
    seed: int, split: str, backgrounds: Backgrounds, grid: tuple[int, int, int], frames: int, fps: float, size: int
) -> Sight:
    """A video of a crowd in clips of CLIP frames, each also backwards, so that only the order of frames tells which way
    things move; and of each token of a clip which thing's centre it sees.

    Args:
        grid: of a clip's tokens, (T, H, W).

    Raises:
        ValueError: an unknown split.
    """
    random = np.random.default_rng((SPLITS.index(split), seed, 2))
    scene = Scene("crowd", tuple(_arranged(random, split, CROWD)))
    shown = _shown(scene, random, split, backgrounds, frames, fps, size)
    clips = shown.reshape(-1, CLIP, *shown.shape[1:])
    times, rows, columns = grid
    words = np.full((len(clips), times, rows, columns, len(WORDS)), NOTHING)
    for number in range(frames):
        clip, within = divmod(number, CLIP)
        for thing, (x, y) in _seen(scene, number, frames):
            words[clip, within * times // CLIP, int(y * rows), int(x * columns)] = thing.words
    back = words[:, ::-1].copy()
    back[..., -1] = BACKWARDS[back[..., -1]]
    both = np.concatenate([words, back])
    return Sight(np.concatenate([clips, clips[:, ::-1]]), both.reshape(len(both), -1, len(WORDS)))


def _shown(
    scene: Scene,
    random: np.random.Generator,
    split: str,
    backgrounds: Backgrounds,
    frames: int,
    fps: float,
    size: int,
) -> NDArray[np.uint8]:
    return render(scene, backgrounds.sample(random, frames, fps, size, VIDEO_SHARE, split == "train"))
