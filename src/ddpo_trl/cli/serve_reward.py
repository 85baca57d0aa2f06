"""`ddpo-trl serve-reward`."""

from collections.abc import Sequence
from dataclasses import dataclass

from ddpo_trl.cli.arguments import CommandParser
from ddpo_trl.cli.errors import usage_errors
from ddpo_trl.cli.importing import import_object
from ddpo_trl.cli.sources import reward_spec
from ddpo_trl.rewards.server import serve
from ddpo_trl.settings import Count, Positive, documented, setting


@documented()
@dataclass
class ServeRewardArguments:
    """
    Arguments of `ddpo-trl serve-reward`, see [`~ddpo_trl.rewards.server.serve`].
    """

    host: str = setting("127.0.0.1", "Address to listen on; 0.0.0.0 to accept other machines.")
    port: int = setting(8000, "Port to listen on; 0 selects a free one.")
    token: str | None = setting(
        None,
        """Token required from clients. Better set as the environment variable DDPO_TRL_REWARD_TOKEN, since other users
        of the machine can see a command line.""",
    )
    batch_size: Count = setting(16, "Number of images scored at once.")
    max_request_mb: Positive = setting(256.0, "Size limit of a request in megabytes.")
    device: str | None = setting(
        None, "Device of the images passed to the function, such as cuda:1; the GPU by default, if there is one."
    )


def main(argv: Sequence[str]) -> int:
    """Serve a reward function over HTTP until it is interrupted."""
    description = "Serve a reward function over HTTP, for RemoteReward or --reward URL."
    parser = CommandParser(
        [ServeRewardArguments], "ddpo-trl serve-reward", description, example="my_rewards:score --port 8000"
    )
    parser.add_argument("reward", metavar="REWARD", help="module:function, or the name of a built-in reward.")
    (arguments, rest), _ = parser.parse(argv)
    with usage_errors():
        serve(import_object(reward_spec(rest.reward)), **vars(arguments))
    return 0
