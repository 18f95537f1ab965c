"""What a head mostly does, in one word, with the thresholds written down.

Checked in this order; the shares are means over all rows.

=========  ==========================================================================================================
dead       its output is below 1 % of the layer's strongest head (root mean square), or 99 % of its mass lies on sinks
sink       half of its mass or more lies on the first tokens and the learned sink
local      three quarters or more of the mass off the sinks lie in the local window
global     half or more of the mass off the sinks lies outside the window
mixed      everything between
=========  ==========================================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .profile import LayerProfile

LABELS = ("dead", "sink", "local", "global", "mixed")
DEAD_OUTPUT = 0.01
DEAD_SINK = 0.99
SINK_MASS = 0.5
LOCAL_SHARE = 0.75
GLOBAL_SHARE = 0.5


def head_labels(layer: LayerProfile) -> list[str]:
    """One of ``LABELS`` per head."""
    output = layer.output_rms
    labels = []
    for head in range(layer.num_heads):
        sink = float(layer.sink_mass[head] + layer.learned_sink_mass[head])
        window, rest = float(layer.window_mass[head]), float(layer.rest_mass[head])
        off_sink = max(window + rest, 1e-12)
        silent = output is not None and bool(output[head] < DEAD_OUTPUT * output.max())
        if silent or sink >= DEAD_SINK:
            labels.append("dead")
        elif sink >= SINK_MASS:
            labels.append("sink")
        elif window / off_sink >= LOCAL_SHARE:
            labels.append("local")
        elif rest / off_sink >= GLOBAL_SHARE:
            labels.append("global")
        else:
            labels.append("mixed")
    return labels
