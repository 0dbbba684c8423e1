//! What each metric is, for the lines that Prometheus shows to people.

/// Whether a metric only grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// It only grows, while the process lives.
    Counter,
    /// It goes up and down.
    Gauge,
}

use Kind::{Counter, Gauge};

/// Names without their first word, which is the same for all, in order.
pub(super) const METRICS: &[(&str, Kind, &str)] = &[
    ("disk_cache_hits", Counter, "Record pages found in memory."),
    ("disk_cache_misses", Counter, "Record pages read."),
    ("disk_capacity_bytes", Gauge, "Bytes for data."),
    ("disk_checkpoints", Counter, "Checkpoints completed."),
    ("disk_chunks", Gauge, "Chunks on the disk."),
    ("disk_cleaned", Counter, "Chunks marked clean."),
    ("disk_data_writes", Counter, "Data writes sent to the device."),
    ("disk_device_flushes", Counter, "Flushes sent to the device."),
    ("disk_digests", Counter, "Digests made."),
    ("disk_failures", Counter, "Times the disk went out of service."),
    ("disk_faults_injected", Counter, "Faults injected for drills."),
    ("disk_flushes", Counter, "Flushes asked for."),
    ("disk_free_bytes", Gauge, "Bytes unused."),
    ("disk_freed", Counter, "Slots freed."),
    ("disk_installs", Counter, "Installs carried out."),
    (
        "disk_journal_blocks",
        Counter,
        "Journal blocks sent to the device.",
    ),
    ("disk_journal_size", Gauge, "Journal ring, blocks."),
    ("disk_journal_used", Gauge, "Journal ring in use, blocks."),
    ("disk_marks", Counter, "Dirty marks journaled."),
    (
        "disk_mismatches",
        Counter,
        "Blocks read whose checksum was wrong.",
    ),
    ("disk_pages_home", Counter, "Record pages written home."),
    (
        "disk_quarantined_slots",
        Gauge,
        "Slots not used because of damage.",
    ),
    ("disk_read_errors", Counter, "Blocks the device could not read."),
    ("disk_reads", Counter, "Reads carried out."),
    ("disk_refused", Counter, "Requests refused."),
    ("disk_suspect_chunks", Gauge, "Chunks in which damage was found."),
    ("disk_under_way", Gauge, "Requests under way or waiting."),
    ("disk_up", Gauge, "Whether the disk is in service."),
    ("disk_writes", Counter, "Writes carried out."),
    ("disk_zeroes", Counter, "Zeroings carried out."),
    ("raft_applied", Gauge, "Entries of the log that are applied."),
    ("raft_last", Gauge, "Last entry of the log."),
    ("raft_leads", Gauge, "Whether this node leads."),
    (
        "raft_proposals_answered",
        Counter,
        "Proposals whose outcome is known.",
    ),
    (
        "raft_proposals_unknown",
        Counter,
        "Proposals whose outcome stayed unknown.",
    ),
    ("raft_term", Gauge, "Raft's term."),
    (
        "reactor_buffers_lent",
        Gauge,
        "Buffers that late disks still have.",
    ),
    (
        "reactor_busy_turns",
        Counter,
        "Turns in which there was something to do.",
    ),
    (
        "reactor_bytes_copied_in",
        Counter,
        "Bytes copied out of guests' memory.",
    ),
    (
        "reactor_bytes_copied_out",
        Counter,
        "Bytes copied into guests' memory.",
    ),
    ("reactor_enters", Counter, "Calls of io_uring_enter."),
    ("reactor_errors", Counter, "Requests answered with an error."),
    ("reactor_queues_idle", Gauge, "Queues that wait for a kick."),
    ("reactor_queues_polled", Gauge, "Queues being polled."),
    ("reactor_requests", Counter, "Requests of guests."),
    ("reactor_sleeps", Counter, "Times it slept."),
    ("reactor_turns", Counter, "Turns of the loop."),
    ("reactor_waits", Counter, "Requests that waited for room."),
    ("vms_running", Gauge, "VMs of the cluster that run on this node."),
    (
        "volume_answers_odd",
        Counter,
        "Answers that belong to no request, or do not fit it.",
    ),
    (
        "volume_blocks_adopted",
        Counter,
        "Blocks whose content was adopted after all replicas lost power.",
    ),
    ("volume_blocks_lost", Counter, "Blocks recorded lost."),
    (
        "volume_blocks_repaired",
        Counter,
        "Blocks made good on replicas in sync.",
    ),
    (
        "volume_bytes_synced",
        Counter,
        "Bytes sent to replicas to make them equal.",
    ),
    (
        "volume_chains_malformed",
        Counter,
        "Chains without header, status byte or readable descriptors.",
    ),
    (
        "volume_chains_too_long",
        Counter,
        "Chains longer than allowed or looping.",
    ),
    (
        "volume_chains_unmapped",
        Counter,
        "Chains with an address outside the guest's memory.",
    ),
    ("volume_connected", Gauge, "Whether a front end is connected."),
    ("volume_connections", Counter, "Connections accepted."),
    (
        "volume_errors_io",
        Counter,
        "Operations failed for want of a valid copy.",
    ),
    (
        "volume_errors_no_space",
        Counter,
        "Operations failed for want of room.",
    ),
    ("volume_errors_timeout", Counter, "Operations failed by time."),
    (
        "volume_generations_renewed",
        Counter,
        "New generations taken while serving.",
    ),
    (
        "volume_heal_seconds",
        Gauge,
        "Seconds until nothing is to be healed, at the present pace; absent while there is none.",
    ),
    (
        "volume_logs_foreign",
        Counter,
        "Connections whose log belonged to another instance of the volume.",
    ),
    (
        "volume_memory_truncated",
        Counter,
        "Times memory was truncated under the device.",
    ),
    (
        "volume_messages_refused",
        Counter,
        "Messages refused, or broken off.",
    ),
    ("volume_operations", Gauge, "Operations under way."),
    ("volume_queues_broken", Counter, "Queues stopped for good."),
    (
        "volume_read_repairs",
        Counter,
        "Blocks found bad by reads and answered from elsewhere.",
    ),
    (
        "volume_regions_to_heal",
        Gauge,
        "Regions (1 MiB) still to be compared or copied.",
    ),
    (
        "volume_regions_to_rebuild",
        Gauge,
        "Regions of rebuilding replicas still to copy.",
    ),
    (
        "volume_regions_unsettled",
        Gauge,
        "Regions to be compared before their first I/O.",
    ),
    (
        "volume_regions_verified",
        Counter,
        "Regions read and compared on all replicas.",
    ),
    ("volume_replicas", Gauge, "Replicas wanted."),
    ("volume_replicas_in_sync", Gauge, "Replicas in sync."),
    (
        "volume_requests_failed",
        Counter,
        "Requests failed because memory was truncated or the log was foreign.",
    ),
    (
        "volume_requests_out_of_range",
        Counter,
        "Requests beyond the end, of odd length or too large.",
    ),
    (
        "volume_requests_read_only",
        Counter,
        "Writes to a read-only device.",
    ),
    (
        "volume_requests_resumed",
        Counter,
        "Requests resumed from a log after a reconnect.",
    ),
    (
        "volume_requests_unsupported",
        Counter,
        "Requests of an unknown kind or with unknown flags.",
    ),
    ("volume_size_bytes", Gauge, "Size."),
];
