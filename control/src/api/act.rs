//! Everything that changes something: a proposal, or a word to the one node that can do it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{FromRequest, Path, Request, State};
use axum::http::{HeaderMap, StatusCode};
use serde::de::DeserializeOwned;
use tokio::time::Instant;
use unibody_dataplane::geometry::Geometry;

use super::types::{Attached, Drain, NewVolume, OnNode, Resize, VmDefinition, VmStop};
use super::{Api, DO, Failure, PASSED_ON, PAUSE, conflict, find_node, name_of, show, wrong};
use crate::admin::{NodeStatus, VolumeStatus};
use crate::cluster::vms::SECONDS_MAX;
use crate::cluster::{LocalRequest, Told};
use crate::planner;
use crate::state::{Applied, Command, Disk, NodeId, Refused, State as Control, VmSpec, Volume};

/// Times that a placement is planned anew because disks have come or gone meanwhile.
const PLANS: u32 = 5;
/// Between two looks at whether something has come about.
const LOOK: Duration = Duration::from_millis(20);

/// A body of JSON; what is wrong with one that is none is said as everything else is.
pub(super) struct Given<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Api> for Given<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, api: &Api) -> Result<Self, Failure> {
        match Json::from_request(request, api).await {
            Ok(Json(given)) => Ok(Given(given)),
            Err(rejection) => Err(Failure(rejection.status(), rejection.body_text())),
        }
    }
}

/// The same, or no body at all.
pub(super) struct Perhaps<T>(pub(super) Option<T>);

impl<T: DeserializeOwned> FromRequest<Api> for Perhaps<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, api: &Api) -> Result<Self, Failure> {
        let body = Bytes::from_request(request, api).await;
        let body = body.map_err(|rejection| Failure(rejection.status(), rejection.body_text()))?;
        if body.is_empty() {
            return Ok(Perhaps(None));
        }
        let given = serde_json::from_slice(&body);
        given
            .map(Perhaps)
            .map_err(|error| Failure(StatusCode::UNPROCESSABLE_ENTITY, error.to_string()))
    }
}

/// How long a guest is given that is asked for something.
pub(super) fn bounded(seconds: u64) -> Result<u64, Failure> {
    match seconds <= SECONDS_MAX {
        true => Ok(seconds),
        false => Err(wrong(format!(
            "{seconds} s are too long to wait: {SECONDS_MAX} at most"
        ))),
    }
}

pub(super) type Done = Result<StatusCode, Failure>;

pub(super) fn done(_: Applied) -> StatusCode {
    StatusCode::NO_CONTENT
}

/// Disks that nothing new goes to, as far as their nodes answer.
async fn full(api: &Api, state: &Arc<Control>) -> BTreeSet<Disk> {
    let mut told = Told::default();
    told.take(state, &show::disks_said(api, state).await);
    told.fills.full
}

/// Makes a volume.
#[utoipa::path(post, path = "/v1/volumes", request_body = NewVolume, responses((status = 204), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn create_volume(State(api): State<Api>, Given(new): Given<NewVolume>) -> Done {
    for plan in 1.. {
        let (view, _) = api.view().await;
        let state = &*view.state;
        let near = new
            .near
            .as_deref()
            .map(|name| find_node(state, name))
            .transpose()?;
        let stripe_width = new.stripe_width.unwrap_or_else(|| planner::default_width(state));
        let geometry =
            Geometry::new(new.stripe_unit, stripe_width).map_err(|error| wrong(error.to_string()))?;
        if !(1..=3).contains(&new.mirror) {
            return Err(Refused::Mirror(new.mirror).into());
        }
        if new.size == 0 || new.size > crate::state::VOLUME_BYTES_MAX {
            return Err(Refused::Size(new.size).into());
        }
        let count = geometry.chunks(new.size);
        let chunks =
            planner::plan_chunks_near(state, count, new.mirror, near, &full(&api, &view.state).await)?;
        let instance = crate::raft::random();
        let create = Command::CreateVolume {
            name: new.name.clone(),
            size: new.size,
            mirror: new.mirror,
            stripe_unit: new.stripe_unit,
            stripe_width,
            read_only: new.read_only,
            instance,
            chunks,
        };
        match api.decide(create).await? {
            Err(Refused::Placement { .. }) if plan < PLANS => continue,
            created => with(&api, created, &new.name, |volume| volume.instance == instance).await?,
        }
        if let Some(node) = near {
            let attach = Command::Attach {
                name: new.name.clone(),
                node,
                generation: 0,
            };
            // If the leader was faster it has an owner too, and can be attached where it is wanted.
            api.propose(attach).await.ok();
        }
        return Ok(StatusCode::NO_CONTENT);
    }
    unreachable!("the last plan's outcome is returned")
}

/// The outcome of a change of a volume. That the volume has been attached since is no failure of the change.
async fn with(
    api: &Api,
    outcome: Result<Applied, Refused>,
    name: &str,
    is_done: impl Fn(&Volume) -> bool,
) -> Result<(), Failure> {
    match outcome {
        Ok(_) => Ok(()),
        Err(Refused::Overtaken { name: of }) => {
            let (view, _) = api.view().await;
            let done = view.state.volumes.get(name).is_some_and(|volume| is_done(volume));
            done.then_some(()).ok_or(Refused::Overtaken { name: of }.into())
        }
        Err(refused) => Err(refused.into()),
    }
}

/// Gives a volume more room.
#[utoipa::path(post, path = "/v1/volumes/{name}/resize", params(("name" = String, Path)), request_body = Resize, responses((status = 204), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn resize_volume(
    State(api): State<Api>,
    Path(name): Path<String>,
    Given(Resize { size }): Given<Resize>,
) -> Done {
    let (view, _) = api.view().await;
    let state = &*view.state;
    let volume = state.volumes.get(&name).ok_or(Refused::NoVolume(name.clone()))?;
    if size == 0 || size > crate::state::VOLUME_BYTES_MAX {
        return Err(Refused::Size(size).into());
    }
    let more = volume
        .geometry()
        .chunks(size)
        .saturating_sub(volume.chunks.len() as u32);
    let chunks = planner::plan_chunks_near(state, more, volume.mirror, None, &full(&api, &view.state).await)?;
    let resize = Command::ResizeVolume {
        name: name.clone(),
        size,
        chunks,
    };
    let resized = api.decide(resize).await?;
    with(&api, resized, &name, |volume| volume.size >= size).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Deletes a volume and everything in it.
#[utoipa::path(delete, path = "/v1/volumes/{name}", params(("name" = String, Path)), responses((status = 204), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn delete_volume(State(api): State<Api>, Path(name): Path<String>) -> Done {
    let (view, _) = api.view().await;
    let volume = view
        .state
        .volumes
        .get(&name)
        .ok_or(Refused::NoVolume(name.clone()))?;
    // A guest on it would be left without: its owner knows, if it answers.
    if let Some(owner) = volume.owner
        && let Some(found) = of_volume(&api, &view.state, owner, &name).await
        && found
            .counters
            .get("connected")
            .is_some_and(|connected| *connected != 0)
    {
        let why = format!(
            "volume {name} is in use on node {}: stop the VM first",
            name_of(&view.state, owner)
        );
        return Err(conflict(why));
    }
    api.propose(Command::DeleteVolume { name }).await.map(done)
}

/// What the owner of a volume says of it.
async fn of_volume(api: &Api, state: &Control, owner: NodeId, name: &str) -> Option<VolumeStatus> {
    let value = api.ask(state, owner, LocalRequest::Status).await.ok()?;
    let status: NodeStatus = serde_json::from_value(value).ok()?;
    status.volumes.into_iter().find(|found| found.name == name)
}

/// Attaches a volume to a node, or moves it there, and waits until it is served.
#[utoipa::path(post, path = "/v1/volumes/{name}/attach", params(("name" = String, Path)), request_body = OnNode, responses((status = 200, body = Attached), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn attach_volume(
    State(api): State<Api>,
    Path(name): Path<String>,
    Given(on): Given<OnNode>,
) -> Result<Json<Attached>, Failure> {
    let end = Instant::now() + DO;
    let mut asked = false;
    loop {
        let (view, _) = api.view().await;
        let state = &*view.state;
        let volume = state.volumes.get(&name).ok_or(Refused::NoVolume(name.clone()))?;
        let wanted = on
            .node
            .as_deref()
            .map(|node| find_node(state, node))
            .transpose()?;
        let to = wanted.or(volume.owner).unwrap_or(api.0.me);
        match volume.owner {
            Some(owner) if owner == to => {
                let found = of_volume(&api, state, owner, &name).await;
                if let Some(socket) = found.and_then(|found| found.socket) {
                    let node = name_of(state, owner);
                    return Ok(Json(Attached { node, socket }));
                }
            }
            Some(owner) if !asked => {
                let volume = name.clone();
                let let_go = LocalRequest::LetGo { volume, to: Some(to) };
                // An owner that does not have it yet is asked again.
                asked = api.ask(state, owner, let_go).await.map_err(conflict)? == true;
            }
            Some(_) => {}
            None => {
                let attach = Command::Attach {
                    name: name.clone(),
                    node: to,
                    generation: volume.generation,
                };
                match api.propose(attach).await {
                    // Somebody else has attached it meanwhile.
                    Err(Failure(StatusCode::CONFLICT, _)) => {}
                    other => drop(other?),
                }
            }
        }
        if Instant::now() >= end {
            let why = format!(
                "volume {name} is not served on node {} yet: see `unibody status`",
                name_of(state, to)
            );
            return Err(Failure(StatusCode::SERVICE_UNAVAILABLE, why));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Says what a VM is; one that runs is that after its next start.
#[utoipa::path(put, path = "/v1/vms/{name}", params(("name" = String, Path)), request_body = VmDefinition, responses((status = 204), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn define_vm(
    State(api): State<Api>,
    Path(name): Path<String>,
    Given(VmDefinition { definition }): Given<VmDefinition>,
) -> Done {
    let (needs, definition) = api.0.host.check(&definition).map_err(wrong)?;
    if needs.name != name {
        return Err(wrong(format!(
            "the definition is of a VM {}, not {name}",
            needs.name
        )));
    }
    let (view, _) = api.view().await;
    let (memory, volumes) = (needs.memory, needs.volumes);
    let command = match view.state.vms.contains_key(&name) {
        true => Command::DescribeVm {
            name,
            of: None,
            definition,
            memory,
            volumes,
        },
        false => Command::CreateVm {
            name,
            vm: VmSpec {
                definition,
                memory,
                volumes,
                run: false,
            },
        },
    };
    api.propose(command).await.map(done)
}

/// Has a VM run, on a node of choice or wherever there is room, from now on and after every failure of a node.
#[utoipa::path(post, path = "/v1/vms/{name}/start", params(("name" = String, Path)), request_body = OnNode, responses((status = 204), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn start_vm(
    State(api): State<Api>,
    Path(name): Path<String>,
    Given(on): Given<OnNode>,
) -> Done {
    let (view, _) = api.view().await;
    let state = &*view.state;
    let vm = state.vms.get(&name).ok_or(Refused::NoVm(name.clone()))?;
    let wanted = on
        .node
        .as_deref()
        .map(|node| find_node(state, node))
        .transpose()?;
    let run = Command::RunVm {
        name: name.clone(),
        run: true,
        seconds: None,
    };
    let Some(node) = wanted.filter(|node| vm.node != Some(*node)) else {
        return api.propose(run).await.map(done);
    };
    if let Some(there) = vm.node {
        let why = format!("VM {name} is on node {}: stop it first", name_of(state, there));
        return Err(conflict(why));
    }
    let place = Command::PlaceVm {
        name: name.clone(),
        node: Some(node),
        epoch: vm.epoch,
    };
    // Both or none: a VM that is to run and has no place gets one from the leader, which may not be the wanted one.
    state.clone().apply(&place)?;
    let Applied::Batch(outcomes) = api.propose(Command::Batch(vec![place, run])).await? else {
        return Err(conflict("the state answered something else than was asked"));
    };
    for outcome in outcomes {
        outcome?;
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Shuts a VM down, and keeps it so. Without a body its guest has a minute.
#[utoipa::path(post, path = "/v1/vms/{name}/stop", params(("name" = String, Path)), request_body = Option<VmStop>, responses((status = 204), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn stop_vm(
    State(api): State<Api>,
    Path(name): Path<String>,
    Perhaps(stop): Perhaps<VmStop>,
) -> Done {
    let seconds = stop.map(|stop| bounded(stop.seconds)).transpose()?;
    run_not(&api, name, seconds).await
}

/// Says that a VM is not to run, and how long its guest may take to end it.
pub(super) async fn run_not(api: &Api, name: String, seconds: Option<u64>) -> Done {
    let stop = Command::RunVm {
        name,
        run: false,
        seconds: seconds.map(|seconds| seconds as u32),
    };
    api.propose(stop).await.map(done)
}

/// Forgets a VM that is stopped. Its volumes stay.
#[utoipa::path(delete, path = "/v1/vms/{name}", params(("name" = String, Path)), responses((status = 204), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn delete_vm(State(api): State<Api>, Path(name): Path<String>) -> Done {
    api.propose(Command::DeleteVm { name }).await.map(done)
}

/// Has data and VMs leave a node, or ends that.
#[utoipa::path(post, path = "/v1/nodes/{node}/drain", params(("node" = String, Path)), request_body = Drain, responses((status = 204), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn drain_node(
    State(api): State<Api>,
    Path(node): Path<String>,
    Given(Drain { on }): Given<Drain>,
) -> Done {
    let (view, _) = api.view().await;
    let node = find_node(&view.state, &node)?;
    api.propose(Command::Drain { node, on }).await.map(done)
}

/// Removes a node that is drained or lost, with its disks. It can not come back but as a new one.
#[utoipa::path(delete, path = "/v1/nodes/{node}", params(("node" = String, Path)), responses((status = 204), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn remove_node(State(api): State<Api>, Path(node): Path<String>) -> Done {
    let (view, _) = api.view().await;
    let node = find_node(&view.state, &node)?;
    api.propose(Command::RemoveNode { node }).await.map(done)
}

/// Has a certain node do what only it can do, whichever node is asked.
#[utoipa::path(post, path = "/v1/nodes/{node}/command", params(("node" = String, Path)), request_body = LocalRequest, responses((status = 200, body = Object), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn command(
    State(api): State<Api>,
    Path(node): Path<String>,
    headers: HeaderMap,
    Given(request): Given<LocalRequest>,
) -> Result<Json<serde_json::Value>, Failure> {
    // As it is known here: this also has to work without a leader.
    let view = api.0.cluster.view();
    let node = find_node(&view.state, &node)?;
    if node != api.0.me && headers.contains_key(PASSED_ON) {
        let why = format!(
            "its address leads to node {}: is it the one that it was started with?",
            name_of(&view.state, api.0.me)
        );
        return Err(Failure(StatusCode::MISDIRECTED_REQUEST, why));
    }
    let added = match &request {
        LocalRequest::DiskAdd { spec } => Some(spec.clone()),
        _ => None,
    };
    let answer = api.ask(&view.state, node, request).await.map_err(conflict)?;
    match added {
        Some(spec) => disk_added(&api, &view.state, node, &spec).await.map(Json),
        None => Ok(Json(answer)),
    }
}

/// Waits until a new disk is in service; one that can not be used is let go again.
async fn disk_added(
    api: &Api,
    state: &Control,
    node: NodeId,
    spec: &str,
) -> Result<serde_json::Value, Failure> {
    let name = spec.split(',').next().unwrap_or(spec);
    let end = Instant::now() + DO;
    while Instant::now() < end {
        let value = api
            .ask(state, node, LocalRequest::Status)
            .await
            .map_err(conflict)?;
        let status: NodeStatus =
            serde_json::from_value(value).map_err(|error| conflict(error.to_string()))?;
        // One in memory has a name that only its node knows: the last one is new.
        let mut disks = status.disks.into_iter().rev();
        let found = disks.find(|disk| disk.name == name || name.contains(':'));
        match found {
            Some(disk) if disk.state == "online" => {
                return serde_json::to_value(disk).map_err(|error| conflict(error.to_string()));
            }
            Some(disk) if disk.state == "failed" => {
                let request = LocalRequest::DiskForget { disk: disk.name };
                api.ask(state, node, request).await.map_err(conflict)?;
                return Err(conflict(disk.reason.unwrap_or_default()));
            }
            _ => tokio::time::sleep(PAUSE).await,
        }
    }
    let why = format!("disk {spec} is not in service yet: see `unibody disk list`");
    Err(Failure(StatusCode::SERVICE_UNAVAILABLE, why))
}
