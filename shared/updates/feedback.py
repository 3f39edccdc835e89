"""What a site keeps of what its codecs left out, and adds to its next update. Pure.

Karimireddy et al. 2019 show why (error feedback fixes SignSGD and other compression): what was left out is late then,
not lost. Momentum correction and masking are those of Lin et al. 2018 (Deep Gradient Compression, section 3), for
codecs that send few elements: an element that waits for its turn gathers with momentum, as it would have in training
without compression; one that was sent begins anew. The third part, warm-up, is ``warm_up`` of ``codecs.py``.

The functions are for one segment, so that a site may keep its arrays in files; ``Feedback`` is for arrays in memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shared.updates.codec import Floats
from shared.updates.segments import Segment


def compensated(update: Floats, left: Floats, velocity: Floats | None, momentum: float) -> tuple[Floats, Floats | None]:
    """What to send of an update, after what was left of the last ones; and the new velocity (None where ``momentum`` is
    0). All of one shape; ``left`` and ``velocity`` are zeros in the first round."""
    if not momentum:
        return update + left, None
    moved = update if velocity is None else update + np.float32(momentum) * velocity
    return moved + left, moved


def settled(sent: Floats, decoded: Floats, velocity: Floats | None) -> tuple[Floats, Floats | None]:
    """What is left once ``decoded`` has arrived of what was to be ``sent``; and the velocity, 0 where it has moved."""
    return sent - decoded, None if velocity is None else np.where(decoded != 0, np.float32(0), velocity)


class Feedback:
    """What one site keeps for one model, tensors by their names.

    Without momentum, what was decoded in all rounds and what is left are the sum of all updates, but for the rounding
    of float32. A round is ``compensate`` for each segment, ``kept`` with what came of it (``write_update`` calls
    it), and ``commit`` once the update was counted; without that the next round begins where this one did.
    """

    def __init__(
        self,
        left: Mapping[str, Floats] | None = None,
        velocities: Mapping[str, Floats] | None = None,
        *,
        momentum: float = 0.0,
    ) -> None:
        """``left`` and ``velocities``: of rounds before, as they were saved: flat arrays, all elements of a tensor."""
        if not 0 <= momentum < 1:
            raise ValueError("momentum is at least 0 and below 1")
        self.left = dict(left or {})
        self.velocities = dict(velocities or {})
        self._momentum = momentum
        self._pending: dict[str, list[tuple[Floats, Floats | None]]] = {}
        self._moved: dict[tuple[str, int], Floats | None] = {}

    def compensate(self, name: str, segment: Segment, values: Floats) -> Floats:
        """What to send in place of ``values``, a segment of this round's update: of the same shape, new."""
        left, velocity = (_part(arrays.get(name), segment) for arrays in (self.left, self.velocities))
        if left is None:
            left = np.zeros(segment.count, np.float32)
        update = values.reshape(-1)
        sent, self._moved[name, segment.first] = compensated(update, left, velocity, self._momentum)
        return sent.reshape(values.shape)

    def kept(self, name: str, segment: Segment, values: Floats, decoded: Floats) -> None:
        """What came of a segment that was compensated: ``decoded`` of ``values``."""
        velocity = self._moved.pop((name, segment.first))
        done = settled(values.reshape(-1), decoded.reshape(-1), velocity)
        self._pending.setdefault(name, []).append(done)

    def commit(self) -> None:
        """The update was counted. Of each tensor in it all segments were kept, in their order."""
        for name, done in self._pending.items():
            self.left[name] = np.concatenate([left for left, _ in done])
            if self._momentum:
                self.velocities[name] = np.concatenate([velocity for _, velocity in done if velocity is not None])
        self.discard()

    def discard(self) -> None:
        """The update was not counted, and never will be."""
        self._pending.clear()
        self._moved.clear()


def _part(flat: Floats | None, segment: Segment) -> Floats | None:
    return None if flat is None else flat.reshape(-1)[segment.first : segment.first + segment.count]
