"""What one step is going to compute: made by the scheduler, run by the engine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pdserve.engine.core.sequences import Work


@dataclass(slots=True)
class Batch:
    """What one step is going to compute."""

    items: list[Work] = field(default_factory=list)
    copy_sources: list[int] = field(default_factory=list)
    copy_targets: list[int] = field(default_factory=list)
    """Pool blocks that were copied on write for this step."""
    num_prompt_tokens: int = 0
    """Of prompts, and of what is recomputed."""

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)

    @property
    def num_context_tokens(self) -> int:
        """Tokens whose KV is read, new ones included."""
        return sum(item.start + item.num_tokens for item in self.items)

    @property
    def num_sampled_tokens(self) -> int:
        return sum(len(item.choices) for item in self.items)

    def wanted_items(self) -> list[Work]:
        """Without what has ended since it was scheduled."""
        return [
            replace(item, choices=tuple(choice for choice in item.choices if choice.alive))
            for item in self.items
            if item.seq.alive
        ]
