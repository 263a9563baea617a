"""A ROS 2 node that watches a camera and answers questions about what it sees.

    ros2 run ... or:  python examples/ros2_node.py --ros-args -p package:=InternVL3-1B-cpu -p fps:=4.0

    /image    (sensor_msgs/Image)  ──▶ session.push, at most `fps` frames a second of the messages' own time
    /question (std_msgs/String)    ──▶ session.ask
    /answer   (std_msgs/String)    ◀── the answer, piece by piece; an empty piece ends it

Needs rclpy, sensor_msgs and std_msgs from a ROS 2 installation. What happens to a message needs none of them.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from liteframe.runtime import EngineError, InputError, VideoSession
from numpy.typing import NDArray

# encoding -> channels of the message, and where red, green and blue are among them
ENCODINGS = {
    "rgb8": (3, (0, 1, 2)),
    "bgr8": (3, (2, 1, 0)),
    "rgba8": (4, (0, 1, 2)),
    "bgra8": (4, (2, 1, 0)),
    "mono8": (1, (0, 0, 0)),
    "8UC3": (3, (2, 1, 0)),  # as OpenCV orders them
    "8UC1": (1, (0, 0, 0)),
}


def to_frame(message: Any) -> tuple[NDArray[np.uint8], float]:
    """A sensor_msgs/Image as (uint8 (H, W, 3), RGB; seconds).

    Raises:
        InputError: an encoding that is not one of ENCODINGS, or less data than height and step promise.
    """
    if message.encoding not in ENCODINGS:
        raise InputError(f"an image in {message.encoding}; {', '.join(ENCODINGS)} were expected")
    channels, order = ENCODINGS[message.encoding]
    height, width, step = message.height, message.width, message.step
    data = np.frombuffer(message.data, np.uint8)
    if step < width * channels or len(data) < height * step or not height * width:
        raise InputError(
            f"an image of {width} x {height} in {message.encoding} has {len(data)} bytes in rows of {step}; at least "
            f"{height * max(step, width * channels)} were expected"
        )
    rows = data[: height * step].reshape(height, step)[:, : width * channels]
    stamp = message.header.stamp
    return rows.reshape(height, width, channels)[:, :, order], stamp.sec + stamp.nanosec / 1e9


class Watcher:
    """What the node does with its messages.

    Args:
        fps: the most frames a second that are pushed, by the messages' time.
        answer: publishes a piece of an answer; an empty one at its end.
        warn: logs what went wrong with a message.

    Attributes:
        refused: images that could not be used.
    """

    def __init__(
        self, session: VideoSession, fps: float, answer: Callable[[str], object], warn: Callable[[str], object]
    ):
        self._session, self._step, self._answer, self._warn = session, 1 / fps, answer, warn
        self._due = -math.inf
        self.refused = 0

    def on_image(self, message: Any) -> None:
        try:
            frame, seconds = to_frame(message)
            if seconds < self._due:
                return
            self._session.push(frame, seconds)
        except (InputError, EngineError) as error:
            self.refused += 1
            self._warn(f"image {self.refused} that was not used: {error}")
        else:
            # on its own grid, so that a camera's jitter does not add up; after a pause the grid begins anew
            late = seconds - self._due
            self._due = seconds + self._step - (late if late < self._step else 0.0)

    def on_question(self, message: Any) -> threading.Thread:
        """Answers in a thread of its own, so that images go on to be taken; returns it."""
        thread = threading.Thread(target=self._reply, args=(message.data,), daemon=True)
        thread.start()
        return thread

    def _reply(self, question: str) -> None:
        try:
            for piece in self._session.ask(question):
                self._answer(piece)
        except (InputError, EngineError) as error:
            self._warn(f"the question {question!r} was not answered to its end: {error}")
        self._answer("")


def main() -> None:
    import rclpy
    from rclpy.node import Node
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import Image
    from std_msgs.msg import String

    rclpy.init(args=sys.argv)
    node = Node("liteframe")
    node.declare_parameter("package", "")
    node.declare_parameter("fps", 4.0)
    package, fps = (node.get_parameter(name).value for name in ("package", "fps"))
    publisher = node.create_publisher(String, "answer", 10)
    with VideoSession(package, when_full="drop-oldest") as session:
        watcher = Watcher(
            session,
            fps,
            lambda piece: publisher.publish(String(data=piece)),
            lambda why: node.get_logger().warning(why),
        )
        node.create_subscription(Image, "image", watcher.on_image, qos_profile_sensor_data)
        node.create_subscription(String, "question", watcher.on_question, 10)
        try:
            rclpy.spin(node)
        finally:
            node.destroy_node()
            rclpy.try_shutdown()


if __name__ == "__main__":
    main()
