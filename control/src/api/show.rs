//! The state of the cluster, and the stream of its changes.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use tokio::task::JoinSet;

use super::types::{Balance, Changes, ClusterStatus, DiskSummary, NodeSummary, VmSummary, VolumeSummary};
use super::{Api, name_of};
use crate::admin::{DiskStatus, NodeStatus, VolumeStatus};
use crate::cluster::{self, LocalRequest};
use crate::planner::balance::{self, Fills};
use crate::raft::{self, View};
use crate::state::{Disk, DiskRecord, NodeId, ReplicaState, State as Control, Vm, Volume};

/// A watcher that is told nothing for so long is told so: one that has vanished is noticed only by what is sent to it.
const QUIET_MAX: Duration = Duration::from_secs(30);

/// What the nodes that answer say of themselves.
type Said = BTreeMap<NodeId, NodeStatus>;

/// The whole cluster: nodes, disks, volumes, VMs, redundancy, and what is being healed.
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = ClusterStatus)))]
pub(super) async fn status(State(api): State<Api>) -> Json<ClusterStatus> {
    let (view, confirmed) = api.view().await;
    let said = said(&api, &view.state).await;
    let raft = api.0.cluster.status();
    let state = &*view.state;
    Json(ClusterStatus {
        node: name_of(state, api.0.me),
        leader: raft.leader.map(|leader| name_of(state, leader)),
        confirmed,
        applied: view.applied,
        nodes: nodes(state, &raft, &said),
        disks: with_stuck(state, disks(state, &said)),
        volumes: volumes(state, &said),
        vms: vms(state, Some(&said)),
        balance: Balance {
            moving: balance::moving(state) as u64,
            left: balance::left(state),
        },
    })
}

/// Asks all nodes at once.
pub(super) async fn said(api: &Api, state: &Arc<Control>) -> Said {
    let mut asking = JoinSet::new();
    for &node in state.nodes.keys() {
        let (api, state) = (api.clone(), Arc::clone(state));
        asking.spawn(async move { (node, api.ask(&state, node, LocalRequest::Status).await) });
    }
    let mut said = Said::new();
    while let Some(answer) = asking.join_next().await {
        if let Ok((node, Ok(value))) = answer
            && let Ok(status) = serde_json::from_value(value)
        {
            said.insert(node, status);
        }
    }
    said
}

/// What the nodes that answer say of their disks.
pub(super) async fn disks_said(api: &Api, state: &Arc<Control>) -> Vec<DiskStatus> {
    let nodes = said(api, state).await.into_values();
    nodes.flat_map(|node| node.disks).collect()
}

fn nodes(state: &Control, raft: &raft::Status, said: &Said) -> Vec<NodeSummary> {
    let role = |id: &NodeId| match id {
        id if raft.leader == Some(*id) => "leader",
        id if raft.voters.contains(id) => "voter",
        id if raft.learners.contains(id) => "learner",
        _ => "none",
    };
    let summary = |(id, node): (&NodeId, &crate::state::Node)| NodeSummary {
        name: node.name.clone(),
        id: id.0,
        addresses: node.addresses.clone(),
        domain: node.domain.clone(),
        role: role(id).into(),
        alive: said.contains_key(id),
        draining: node.drain,
        memory: node.memory,
        memory_free: state.memory_free(*id),
    };
    state.nodes.iter().map(summary).collect()
}

/// What the state knows, with what the nodes say in its place where they do; last what only they know of.
fn disks(state: &Control, said: &Said) -> Vec<DiskSummary> {
    let mut replicas: BTreeMap<String, u64> = BTreeMap::new();
    for slot in state.volumes.values().flat_map(|volume| &volume.chunks).flatten() {
        *replicas.entry(slot.disk.to_string()).or_default() += 1;
    }
    let mut summaries = Vec::new();
    for (disk, record) in &state.disks {
        let uuid = disk.to_string();
        let of_node = said.get(&record.node);
        let found = of_node.and_then(|node| node.disks.iter().find(|found| found.uuid == uuid));
        let status = found.cloned().unwrap_or_else(|| DiskStatus {
            uuid: uuid.clone(),
            domain: state.domain_of(*disk).unwrap_or_default().to_owned(),
            state: if of_node.is_some() {
                "missing"
            } else {
                "unreachable"
            }
            .into(),
            capacity: record.bytes,
            ..DiskStatus::default()
        });
        summaries.push(DiskSummary {
            node: name_of(state, record.node),
            leaving: record.out,
            stuck: false,
            warning: None,
            replicas: replicas.get(&uuid).copied().unwrap_or(0),
            disk: status,
        });
    }
    for (node, status) in said {
        let unknown = status
            .disks
            .iter()
            .filter(|disk| !state.disks.keys().any(|known| known.to_string() == disk.uuid));
        summaries.extend(unknown.map(|disk| DiskSummary {
            node: name_of(state, *node),
            disk: disk.clone(),
            ..DiskSummary::default()
        }));
    }
    summaries
}

/// Says of which disks nothing can go that is to leave them, and which are nearly full. Too dear for the stream of changes.
fn with_stuck(state: &Control, mut disks: Vec<DiskSummary>) -> Vec<DiskSummary> {
    let drained = |record: &DiskRecord| state.nodes.get(&record.node).is_some_and(|node| node.drain);
    for (disk, record) in &state.disks {
        let stuck = (record.out || drained(record)) && !cluster::goes(state, *disk);
        let uuid = disk.to_string();
        for summary in disks.iter_mut().filter(|summary| summary.disk.uuid == uuid) {
            summary.stuck |= stuck;
            summary.warning = warning(*disk, &summary.disk);
        }
    }
    disks
}

/// What is to be done about a disk that is nearly full.
fn warning(disk: Disk, said: &DiskStatus) -> Option<String> {
    let mut fills = Fills::default();
    if said.state == "online" {
        fills.say(disk, said.capacity, said.free);
    }
    let (full, crowded) = (balance::FULL.0, balance::CROWDED.0);
    if fills.crowded.contains(&disk) {
        Some(format!(
            "more than {crowded} % full: what is on it moves to disks with room; add disks, or delete or discard what is not needed"
        ))
    } else if fills.full.contains(&disk) {
        Some(format!(
            "more than {full} % full: nothing new goes to it; add disks, or delete or discard what is not needed"
        ))
    } else {
        None
    }
}

fn volumes(state: &Control, said: &Said) -> Vec<VolumeSummary> {
    let summary = |(name, volume): (&String, &Arc<Volume>)| {
        let owner = volume.owner.and_then(|owner| said.get(&owner));
        let found = owner.and_then(|node| node.volumes.iter().find(|found| found.name == *name));
        VolumeSummary {
            owner: volume.owner.map(|owner| name_of(state, owner)),
            generation: volume.generation,
            vm: state.user_of(name).map(str::to_owned),
            read_only: volume.read_only,
            volume: found.cloned().unwrap_or_else(|| recorded(name, volume)),
        }
    };
    state.volumes.iter().map(summary).collect()
}

/// A volume as the state knows it.
fn recorded(name: &str, volume: &Volume) -> VolumeStatus {
    let count = |wanted| {
        let slots = volume.chunks.iter().flatten();
        slots.filter(|slot| slot.state == wanted).count() as u64
    };
    VolumeStatus {
        name: name.to_owned(),
        size: volume.size,
        mirror: volume.mirror,
        stripe_unit: volume.stripe_unit,
        stripe_width: volume.stripe_width,
        state: "offline".into(),
        replicas: volume.chunks.iter().flatten().count() as u64,
        in_sync: count(ReplicaState::InSync),
        rebuilding: count(ReplicaState::Rebuilding),
        stale: count(ReplicaState::Stale),
        ..VolumeStatus::default()
    }
}

/// `said`: what the nodes say; without it, as the state has them.
pub(super) fn vms(state: &Control, said: Option<&Said>) -> Vec<VmSummary> {
    let summary = |(name, vm): (&String, &Vm)| {
        let runs = match (vm.node, said) {
            (Some(node), Some(said)) => said.get(&node).map(|node| node.vms.contains(name)),
            _ => Some(false),
        };
        let phase = match (vm.spec.run, vm.node, runs) {
            (true, None, _) => "waiting",
            (false, None, _) => "stopped",
            (_, Some(_), None) => "unknown",
            (true, Some(_), Some(true)) => "running",
            (true, Some(_), Some(false)) => "starting",
            (false, Some(_), Some(_)) => "stopping",
        };
        VmSummary {
            name: name.clone(),
            node: vm.node.map(|node| name_of(state, node)),
            memory: vm.spec.memory,
            volumes: vm.spec.volumes.clone(),
            state: phase.into(),
        }
    };
    state.vms.iter().map(summary).collect()
}

/// What of the state is compared for the stream of changes.
#[derive(Default)]
struct Seen {
    nodes: BTreeMap<String, NodeSummary>,
    disks: BTreeMap<String, DiskSummary>,
    volumes: BTreeMap<String, VolumeSummary>,
    vms: BTreeMap<String, VmSummary>,
}

impl Seen {
    fn of(state: &Control, raft: &raft::Status) -> Self {
        let said = Said::new();
        let nodes = nodes(state, raft, &said).into_iter();
        let disks = disks(state, &said).into_iter();
        let volumes = volumes(state, &said).into_iter();
        let vms = vms(state, None).into_iter();
        Seen {
            nodes: nodes.map(|node| (node.name.clone(), node)).collect(),
            disks: disks.map(|disk| (disk.disk.uuid.clone(), disk)).collect(),
            volumes: volumes
                .map(|volume| (volume.volume.name.clone(), volume))
                .collect(),
            vms: vms.map(|vm| (vm.name.clone(), vm)).collect(),
        }
    }

    fn since(&self, before: &Seen, applied: u64) -> Changes {
        Changes {
            applied,
            nodes: changed(&before.nodes, &self.nodes),
            disks: changed(&before.disks, &self.disks),
            volumes: changed(&before.volumes, &self.volumes),
            vms: changed(&before.vms, &self.vms),
        }
    }
}

fn changed<T: Clone + PartialEq>(
    before: &BTreeMap<String, T>,
    now: &BTreeMap<String, T>,
) -> BTreeMap<String, Option<T>> {
    let gone = before.keys().filter(|name| !now.contains_key(*name));
    let differs = now
        .iter()
        .filter(|(name, value)| before.get(*name) != Some(value));
    let mut changes: BTreeMap<_, _> = gone.map(|name| (name.clone(), None)).collect();
    changes.extend(differs.map(|(name, value)| (name.clone(), Some(value.clone()))));
    changes
}

/// Changes of the committed state as they are applied on this node: one JSON object a line, without an end. Several changes
/// may be one line, and a line without any may come now and then. What a node says of itself (what runs, what is healed) is not in it.
#[utoipa::path(get, path = "/v1/watch", responses((status = 200, body = Changes, content_type = "application/x-ndjson")))]
pub(super) async fn watch(State(api): State<Api>) -> Response {
    let kind = [(header::CONTENT_TYPE, "application/x-ndjson")];
    (kind, Body::from_stream(changes(api, QUIET_MAX))).into_response()
}

/// The lines of [`watch`].
pub(super) fn changes(
    api: Api,
    quiet_max: Duration,
) -> impl futures_util::Stream<Item = Result<Vec<u8>, Infallible>> {
    let views = api.0.cluster.views();
    futures_util::stream::unfold(
        (api, views, Seen::default(), true),
        move |(api, mut views, seen, first)| async move {
            let mut quiet = false;
            loop {
                if !first {
                    match tokio::time::timeout(quiet_max, views.changed()).await {
                        Ok(Ok(())) => {}
                        Ok(Err(_)) => return None,
                        Err(_) => quiet = true,
                    }
                }
                let view: Arc<View> = views.borrow_and_update().clone();
                let now = Seen::of(&view.state, &api.0.cluster.status());
                let changes = now.since(&seen, view.applied);
                let nothing = Changes {
                    applied: view.applied,
                    ..Changes::default()
                };
                if first || quiet || changes != nothing {
                    let mut line = serde_json::to_vec(&changes).expect("changes have string keys only");
                    line.push(b'\n');
                    return Some((Ok::<_, Infallible>(line), (api, views, now, false)));
                }
            }
        },
    )
}
