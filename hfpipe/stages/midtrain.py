"""midtrain: structure. Conversations with roles, turns, tools and formats, mixed with plain text against forgetting.

It trains as sft does; it differs in what it starts from (a base model whose control tokens are still untrained, or a Hub
model that has none: `tokenizer.chat_template` adds them) and in its data (sources with `as: text` are replay).

    accelerate launch -m hfpipe.stages.midtrain stage_configs/tiny/midtrain.yaml
"""

from __future__ import annotations

import dataclasses

from hfpipe.sections import Anneal
from hfpipe.stages import sft

TYPE = dataclasses.replace(
    sft.TYPE,
    name="midtrain",
    teaches="structure: roles, turns, tools, formats",
    sections={**sft.TYPE.sections, "anneal": Anneal},
)

prepare = sft.prepare
train = sft.train

if __name__ == "__main__":
    from hfpipe.stages._run import main

    main(TYPE)
