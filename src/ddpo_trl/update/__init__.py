"""Update of the policy: objectives, one pass or two, KL limits, optimizers."""
