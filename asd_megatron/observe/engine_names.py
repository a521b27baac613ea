"""The metrics of the rollout engine: mismatch of its log-probs with the trainer's, servers, their weights."""

from __future__ import annotations

from asd_megatron.observe.metric import Metric, Section

SECTIONS = (
    Section(
        "Engine mismatch",
        "Every step of reinforcement learning, over the tokens that the loss sees. d = trainer's log-prob (before the "
        "step's update) - engine's log-prob.",
        (
            Metric("mismatch/max_abs", "nats", "largest absolute d"),
            Metric("mismatch/mean_abs", "nats", "mean absolute d"),
            Metric("mismatch/k3", "nats", "mean of exp(d) - 1 - d: estimates KL(engine, trainer) of a token"),
            Metric("mismatch/ess", "fraction of tokens", "effective sample size of weights exp(d); 1: all are equal"),
            Metric("mismatch/ess_sequence", "fraction of rollouts", "the same, one weight exp(sum of d) per rollout"),
        ),
    ),
    Section(
        "Weight updates",
        "With `rollout.engine: sglang`. What an update did, in steps that had one; what was compared, of the weights "
        "being served.",
        (
            Metric("weight_sync/seconds", "s", "from pausing the servers until the last one resumes"),
            Metric("weight_sync/megabytes", "MB", "what was sent, counted once for all servers"),
            Metric("weight_sync/gb_per_second", "GB/s", "the same over those seconds"),
            Metric(
                "weight_sync/changed",
                "fraction of elements",
                "sent by the last update: less than 1 after a delta (`rollout.weight_sync_full_every`)",
            ),
            Metric("weight_sync/failures", "servers", "servers whose synchronisation failed"),
            Metric("weight_sync/verified", "0 or 1", "every checksum equals the trainer's; otherwise the run stops"),
            Metric("weight_sync/checked", "tensors", "checksums compared, over all servers and their ranks"),
            Metric(
                "weight_sync/probe_mean_abs",
                "nats",
                "mean absolute difference of the probe's log-probs to the trainer's; of the worst server",
            ),
            Metric("weight_sync/probe_max_abs", "nats", "largest such difference of a token, over all servers"),
            Metric(
                "weight_sync/probe_exceeded",
                "servers",
                "servers whose mean exceeds `rollout.verify_tolerance`: a warning; twice in a row stops the run",
            ),
        ),
    ),
    Section(
        "Servers",
        "With `rollout.engine: sglang`; counted since the step before, except `servers/serving`.",
        (
            Metric("servers/serving", "servers", "servers that have the current weights and serve, now"),
            Metric("servers/retried", "samples", "samples that were retried on another server"),
            Metric("servers/given_up", "samples", "samples that failed too often"),
            Metric("servers/deadline", "samples", "attempts that took longer than `rollout.request_timeout`"),
            Metric("servers/stale_answers", "samples", "answers discarded because they came from other weights"),
            Metric("servers/ejected", "servers", "servers that became unhealthy"),
            Metric("servers/returned", "servers", "servers that became healthy again"),
            Metric("servers/restarts", "servers", "servers that were restarted"),
            Metric("servers/unrouted", "samples", "samples whose routed experts were missing or could not be used"),
        ),
    ),
    Section(
        "Importance correction",
        "With `algorithm.importance_correction`; over the tokens that the loss sees.",
        (
            Metric("importance/mean", "1", "mean weight"),
            Metric("importance/affected", "fraction of tokens", "tokens whose weight was cut or set to 0"),
        ),
    ),
)
