//! Counters of this node in the text form of Prometheus.

use std::collections::BTreeMap;
use std::fmt::Write;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::metric_names::{Kind, METRICS};
use super::{Api, Failure};
use crate::admin::NodeStatus;
use crate::cluster::LocalRequest;
use crate::raft;

/// Counters and states of this node, in the text form of Prometheus (version 0.0.4).
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String, content_type = "text/plain")))]
pub(super) async fn metrics(State(api): State<Api>) -> Result<Response, Failure> {
    let view = api.0.cluster.view();
    let said = api.ask(&view.state, api.0.me, LocalRequest::Status).await;
    let unavailable = |why: String| Failure(axum::http::StatusCode::SERVICE_UNAVAILABLE, why);
    let status: NodeStatus =
        serde_json::from_value(said.map_err(unavailable)?).map_err(|error| unavailable(error.to_string()))?;
    let text = text(&status, &api.0.cluster.status());
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4")];
    Ok((kind, text).into_response())
}

/// Samples by the name of their metric, since all of one metric stand together.
#[derive(Default)]
struct Samples(BTreeMap<String, Vec<(String, u64)>>);

impl Samples {
    fn add(&mut self, metric: String, labels: &[(&str, &str)], value: u64) {
        let labels: Vec<_> = labels
            .iter()
            .map(|(name, value)| format!("{name}=\"{}\"", escaped(value)))
            .collect();
        self.0.entry(metric).or_default().push((labels.join(","), value));
    }

    /// A counter that a node calls by a name of its own.
    fn counters(&mut self, of: &str, labels: &[(&str, &str)], counters: &BTreeMap<String, u64>) {
        for (name, value) in counters {
            let fits = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
            let name: String = name.chars().map(fits).collect();
            self.add(format!("unibody_{of}_{name}"), labels, *value);
        }
    }
}

/// As a label's value has to be written.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

fn text(status: &NodeStatus, raft: &raft::Status) -> String {
    let mut samples = Samples::default();
    for disk in &status.disks {
        let labels = [("disk", disk.name.as_str()), ("uuid", disk.uuid.as_str())];
        samples.add(
            "unibody_disk_up".into(),
            &labels,
            u64::from(disk.state == "online"),
        );
        samples.add("unibody_disk_capacity_bytes".into(), &labels, disk.capacity);
        samples.add("unibody_disk_free_bytes".into(), &labels, disk.free);
        samples.counters("disk", &labels, &disk.counters);
    }
    for volume in &status.volumes {
        let labels = [("volume", volume.name.as_str())];
        samples.add("unibody_volume_size_bytes".into(), &labels, volume.size);
        samples.add("unibody_volume_replicas".into(), &labels, volume.replicas);
        samples.add("unibody_volume_replicas_in_sync".into(), &labels, volume.in_sync);
        samples.add(
            "unibody_volume_regions_to_heal".into(),
            &labels,
            volume.regions_to_heal,
        );
        if let Some(seconds) = volume.heal_seconds {
            samples.add("unibody_volume_heal_seconds".into(), &labels, seconds);
        }
        samples.counters("volume", &labels, &volume.counters);
    }
    for reactor in &status.reactors {
        let core = reactor.core.to_string();
        samples.counters("reactor", &[("core", &core)], &reactor.counters);
    }
    samples.add("unibody_vms_running".into(), &[], status.vms.len() as u64);
    samples.add("unibody_raft_term".into(), &[], raft.term);
    samples.add("unibody_raft_applied".into(), &[], raft.applied);
    samples.add("unibody_raft_last".into(), &[], raft.last);
    samples.add(
        "unibody_raft_leads".into(),
        &[],
        u64::from(raft.leader == Some(raft.node)),
    );
    samples.add("unibody_raft_proposals_answered".into(), &[], raft.proposals.0);
    samples.add("unibody_raft_proposals_unknown".into(), &[], raft.proposals.1);
    let mut text = String::new();
    for (metric, values) in &samples.0 {
        let name = metric.strip_prefix("unibody_").unwrap_or(metric);
        // One that is missing there is shown all the same, as what it is: not known.
        let known = METRICS.binary_search_by_key(&name, |known| known.0);
        let (kind, help) = match known.map(|at| METRICS[at]) {
            Ok((_, Kind::Counter, help)) => ("counter", help),
            Ok((_, Kind::Gauge, help)) => ("gauge", help),
            Err(_) => ("untyped", "Not described."),
        };
        writeln!(text, "# HELP {metric} {help}\n# TYPE {metric} {kind}").expect("a string takes everything");
        for (labels, value) in values {
            let labels = if labels.is_empty() {
                String::new()
            } else {
                format!("{{{labels}}}")
            };
            writeln!(text, "{metric}{labels} {value}").expect("a string takes everything");
        }
    }
    text
}
