"""`ddpo-trl serve-reward`."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ddpo_trl.cli.arguments import CommandParser
from ddpo_trl.cli.errors import usage_errors
from ddpo_trl.cli.importing import import_object
from ddpo_trl.cli.sources import reward_spec
from ddpo_trl.rewards.server import serve


@dataclass
class ServeRewardArguments:
    """
    What `ddpo-trl serve-reward` takes beside the reward function; see [`~ddpo_trl.rewards.server.serve`].

    Args:
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Where to listen; `"0.0.0.0"` for other machines.
        port (`int`, *optional*, defaults to `8000`):
            Port 0 is any that is free.
        token (`str`, *optional*):
            What clients have to know; better set as `DDPO_TRL_REWARD_TOKEN`, since others can see a command line.
        batch_size (`int`, *optional*, defaults to `16`):
            Images scored at once.
        max_request_mb (`float`, *optional*, defaults to `256`):
            A request of more megabytes is refused.
        device (`str`, *optional*):
            Where the function gets its images; on the GPU by default, if there is one.
    """

    host: str = field(default="127.0.0.1", metadata={"help": "Where to listen; 0.0.0.0 for other machines."})
    port: int = field(default=8000, metadata={"help": "0 is any that is free."})
    token: str | None = field(
        default=None, metadata={"help": "What clients have to know; better set as DDPO_TRL_REWARD_TOKEN."}
    )
    batch_size: int = field(default=16, metadata={"help": "Images scored at once."})
    max_request_mb: float = field(default=256.0, metadata={"help": "A request of more megabytes is refused."})
    device: str | None = field(default=None, metadata={"help": "Where the function gets its images: cuda:1, ..."})


def main(argv: Sequence[str]) -> int:
    """Serves a reward function over HTTP until it is told to stop."""
    parser = CommandParser(
        [ServeRewardArguments],
        "ddpo-trl serve-reward",
        "Serve a reward function over HTTP, for RemoteReward or --reward URL.",
        example="my_rewards:score --port 8000",
    )
    parser.add_argument("reward", metavar="REWARD", help="module:function, or the name of a built-in reward.")
    arguments, rest = parser.parse(argv)
    with usage_errors():
        serve(import_object(reward_spec(rest.reward)), **vars(arguments))
    return 0
