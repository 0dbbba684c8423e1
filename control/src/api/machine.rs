//! What is done to a VM that runs: whichever node is asked, the one that runs it does it. What a VM *is* changes in the
//! cluster's state, so that it is the same at its next start, wherever that is.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;

use super::act::{Done, Given, attach_volume, done, stop_vm};
use super::show;
use super::types::{OnNode, Swap, VmDetail, VolumeOff};
use super::{Api, Failure, conflict, name_of, wrong};
use crate::cluster::LocalRequest;
use crate::cluster::vms::{SECONDS_MAX, VmAct, VmChange, VmVolume};
use crate::state::{Command, NodeId, Refused, State as Control, Vm};

fn find<'a>(state: &'a Control, name: &str) -> Result<&'a Vm, Failure> {
    state
        .vms
        .get(name)
        .ok_or_else(|| Refused::NoVm(name.to_owned()).into())
}

fn act(name: &str, act: VmAct) -> LocalRequest {
    LocalRequest::Vm {
        name: name.to_owned(),
        act,
    }
}

/// Has the node of a VM do something to it.
async fn on_its_node(api: &Api, name: &str, what: VmAct) -> Result<serde_json::Value, Failure> {
    let (view, _) = api.view().await;
    let Some(node) = find(&view.state, name)?.node else {
        return Err(conflict(format!("VM {name} does not run: start it first")));
    };
    api.ask(&view.state, node, act(name, what))
        .await
        .map_err(conflict)
}

/// Where a VM runs, if it does: a VM that has a place may still be on its way.
async fn runs(api: &Api, state: &Control, name: &str) -> Result<Option<NodeId>, Failure> {
    let Some(node) = find(state, name)?.node else {
        return Ok(None);
    };
    let status = api.ask(state, node, act(name, VmAct::Status)).await;
    let status = status.map_err(conflict)?;
    Ok((!status.is_null()).then_some(node))
}

/// Changes what a VM is.
async fn amend(api: &Api, name: &str, change: &VmChange) -> Done {
    let (view, _) = api.view().await;
    let vm = find(&view.state, name)?;
    let (needs, definition) = api.0.host.amend(&vm.spec.definition, change).map_err(wrong)?;
    // Whether it is to run stays as it is then, and so does the memory that it holds where it runs.
    let command = Command::DescribeVm {
        name: name.to_owned(),
        definition,
        memory: needs.memory,
        volumes: needs.volumes,
    };
    api.propose(command).await.map(done)
}

fn bounded(seconds: u64) -> Result<u64, Failure> {
    match seconds <= SECONDS_MAX {
        true => Ok(seconds),
        false => Err(wrong(format!(
            "{seconds} s are too long to wait: {SECONDS_MAX} at most"
        ))),
    }
}

/// One VM: where it belongs, what it is, and what its process does.
#[utoipa::path(get, path = "/v1/vms/{name}", params(("name" = String, Path)), responses((status = 200, body = VmDetail), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn vm(State(api): State<Api>, Path(name): Path<String>) -> Result<Json<VmDetail>, Failure> {
    let (view, _) = api.view().await;
    let state = &view.state;
    let vm = find(state, &name)?;
    let said = show::said(&api, state).await;
    let summary = show::vms(state, &said).into_iter().find(|vm| vm.name == name);
    let process = match vm.node {
        Some(node) => api.ask(state, node, act(&name, VmAct::Status)).await,
        None => Ok(serde_json::Value::Null),
    };
    Ok(Json(VmDetail {
        summary: summary.unwrap_or_default(),
        definition: serde_json::from_str(&vm.spec.definition).unwrap_or_default(),
        // Of a node that does not answer nothing is known; the state of the VM says so.
        process: process.unwrap_or_default(),
    }))
}

/// Ends a VM at once, as pulling the plug does, and keeps it so.
#[utoipa::path(post, path = "/v1/vms/{name}/kill", params(("name" = String, Path)), responses((status = 204), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn kill_vm(State(api): State<Api>, Path(name): Path<String>) -> Done {
    let (view, _) = api.view().await;
    let node = find(&view.state, &name)?.node;
    // First, or it would be started again.
    let stopped = stop_vm(State(api.clone()), Path(name.clone())).await?;
    if let Some(node) = node {
        let killed = api.ask(&view.state, node, act(&name, VmAct::Kill)).await;
        killed.map_err(conflict)?;
    }
    Ok(stopped)
}

/// Stops a VM's virtual CPUs.
#[utoipa::path(post, path = "/v1/vms/{name}/pause", params(("name" = String, Path)), responses((status = 204), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn pause_vm(State(api): State<Api>, Path(name): Path<String>) -> Done {
    on_its_node(&api, &name, VmAct::Pause).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Lets a VM's virtual CPUs run again.
#[utoipa::path(post, path = "/v1/vms/{name}/resume", params(("name" = String, Path)), responses((status = 204), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn resume_vm(State(api): State<Api>, Path(name): Path<String>) -> Done {
    on_its_node(&api, &name, VmAct::Resume).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The same VM, the same volumes, the other VMM: it is shut down, and its node starts it again under that. One that does not
/// run is under that at its next start.
#[utoipa::path(post, path = "/v1/vms/{name}/swap", params(("name" = String, Path)), request_body = Swap, responses((status = 204), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn swap_vm(
    State(api): State<Api>,
    Path(name): Path<String>,
    Given(Swap { to, seconds }): Given<Swap>,
) -> Done {
    let seconds = bounded(seconds)?;
    let (view, _) = api.view().await;
    let node = find(&view.state, &name)?.node;
    if let Some(node) = node {
        // Before anything is touched: it must not be shut down for a VMM that is not there.
        let vmms = api.ask(&view.state, node, LocalRequest::Vmms).await;
        let vmms = vmms.map_err(conflict)?;
        let mut all = vmms.as_array().into_iter().flatten();
        let found = all.find(|vmm| vmm["vmm"] == to.as_str());
        if let Some(why) = found.and_then(|vmm| vmm["error"].as_str()) {
            let node = name_of(&view.state, node);
            return Err(conflict(format!("VM {name} is on node {node}, where {why}")));
        }
    }
    amend(&api, &name, &VmChange::Vmm(to)).await?;
    if node.is_some() {
        on_its_node(&api, &name, VmAct::Stop { seconds }).await?;
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Gives a VM another volume, at once if it runs, and for all its starts.
#[utoipa::path(post, path = "/v1/vms/{name}/volumes", params(("name" = String, Path)), request_body = VmVolume, responses((status = 204), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn add_volume(
    State(api): State<Api>,
    Path(name): Path<String>,
    Given(volume): Given<VmVolume>,
) -> Done {
    let (view, _) = api.view().await;
    let node = runs(&api, &view.state, &name).await?;
    // From then on the volume belongs where the VM is.
    amend(&api, &name, &VmChange::AddVolume(volume.clone())).await?;
    let Some(node) = node else {
        return Ok(StatusCode::NO_CONTENT);
    };
    let added = async {
        let on = OnNode {
            node: Some(node.to_string()),
        };
        let _served = attach_volume(State(api.clone()), Path(volume.volume.clone()), Given(on)).await?;
        on_its_node(&api, &name, VmAct::AddVolume(volume.clone())).await
    };
    if let Err(failure) = added.await {
        // As before, or a VM that could not take it would not start with it either.
        amend(&api, &name, &VmChange::RemoveVolume(volume.volume)).await?;
        return Err(failure);
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Takes a volume from a VM, once its guest has let go of it if it runs, and for all its starts.
#[utoipa::path(post, path = "/v1/vms/{name}/volumes/remove", params(("name" = String, Path)), request_body = VolumeOff, responses((status = 204), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn remove_volume(
    State(api): State<Api>,
    Path(name): Path<String>,
    Given(VolumeOff { volume, seconds }): Given<VolumeOff>,
) -> Done {
    let seconds = bounded(seconds)?;
    let (view, _) = api.view().await;
    if !find(&view.state, &name)?.spec.volumes.contains(&volume) {
        return Err(Failure(
            StatusCode::NOT_FOUND,
            format!("VM {name} has no volume {volume}"),
        ));
    }
    if runs(&api, &view.state, &name).await?.is_some() {
        let off = VmAct::RemoveVolume {
            volume: volume.clone(),
            seconds,
        };
        on_its_node(&api, &name, off).await?;
    }
    amend(&api, &name, &VmChange::RemoveVolume(volume)).await
}
