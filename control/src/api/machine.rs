//! What is done to a VM that runs: whichever node is asked, the one that runs it does it. What a VM *is* changes in the
//! cluster's state, so that it is the same at its next start, wherever that is.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;

use super::act::{Done, Given, attach_volume, bounded, run_not};
use super::show;
use super::types::{OnNode, Swap, VmDetail, VolumeOff};
use super::{Api, Failure, conflict, name_of, wrong};
use crate::cluster::LocalRequest;
use crate::cluster::vms::{VmAct, VmChange, VmVolume};
use crate::state::{Command, DefinitionDigest, Refused, State as Control, Vm, VmSpec};

/// Times that a definition is changed anew because somebody else has changed it.
const AMENDS_MAX: u32 = 50;
/// Times that a VM is looked for elsewhere because it was moved.
const MOVES_MAX: u32 = 5;

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

/// What the process of a VM on its node is, as far as the node says; it has only a moment.
async fn process(api: &Api, name: &str) -> Result<serde_json::Value, Failure> {
    let (view, _) = api.view().await;
    let Some(node) = find(&view.state, name)?.node else {
        return Ok(serde_json::Value::Null);
    };
    let said = api.ask(&view.state, node, act(name, VmAct::Status)).await;
    said.map_err(unknown)
}

/// Has a VM that may run know of a volume more or less than before, wherever it is. One that is on its way is waited for; one
/// that is started later is what the state says by then.
async fn follow(api: &Api, name: &str, what: &VmAct) -> Result<(), Failure> {
    for _ in 0..MOVES_MAX {
        let (view, _) = api.view().await;
        let vm = find(&view.state, name)?;
        let Some(node) = vm.node else {
            return Ok(());
        };
        if let VmAct::AddVolume(volume) = what {
            let on = OnNode {
                node: Some(node.to_string()),
            };
            let _served = attach_volume(State(api.clone()), Path(volume.volume.clone()), Given(on)).await?;
        }
        let epoch = vm.epoch;
        let followed = api.ask(&view.state, node, act(name, what.clone())).await;
        followed.map_err(conflict)?;
        let (view, _) = api.view().await;
        if find(&view.state, name)?.epoch == epoch {
            return Ok(());
        }
    }
    Err(conflict(format!("VM {name} is moved about: try again")))
}

/// Changes what a VM is, from whatever it is by then; what it was before, and what it is now.
async fn amend(api: &Api, name: &str, change: &VmChange) -> Result<(VmSpec, DefinitionDigest), Failure> {
    for _ in 0..AMENDS_MAX {
        let (view, _) = api.view().await;
        let before = &find(&view.state, name)?.spec;
        let (needs, definition) = api.0.host.amend(&before.definition, change).map_err(wrong)?;
        let now = DefinitionDigest::of(&definition);
        // Whether it is to run stays as it is then, and so does the memory that it holds where it runs.
        let command = Command::DescribeVm {
            name: name.to_owned(),
            of: Some(DefinitionDigest::of(&before.definition)),
            definition,
            memory: needs.memory,
            volumes: needs.volumes,
        };
        match api.decide(command).await {
            Ok(Ok(_)) => return Ok((before.clone(), now)),
            // It was changed meanwhile: what is changed now is changed in that.
            Ok(Err(Refused::Overtaken { .. })) => {}
            Ok(Err(refused)) => return Err(refused.into()),
            // It may have been done all the same.
            Err(failure) => {
                let (view, confirmed) = api.view().await;
                let is = find(&view.state, name)?;
                return match confirmed && DefinitionDigest::of(&is.spec.definition) == now {
                    true => Ok((before.clone(), now)),
                    false => Err(failure),
                };
            }
        }
    }
    Err(conflict(format!("VM {name} is changed all the time: try again")))
}

/// The same failure, with what follows from it.
fn and(failure: Failure, what: String) -> Failure {
    Failure(failure.0, format!("{}; {what}", failure.1))
}

fn unknown(why: String) -> Failure {
    Failure(StatusCode::SERVICE_UNAVAILABLE, why)
}

/// One VM: where it belongs, what it is, and what its process does.
#[utoipa::path(get, path = "/v1/vms/{name}", params(("name" = String, Path)), responses((status = 200, body = VmDetail), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn vm(State(api): State<Api>, Path(name): Path<String>) -> Result<Json<VmDetail>, Failure> {
    let (view, _) = api.view().await;
    let state = &view.state;
    let vm = find(state, &name)?;
    let process = async {
        match vm.node {
            Some(node) => api.ask(state, node, act(&name, VmAct::Status)).await,
            None => Ok(serde_json::Value::Null),
        }
    };
    let (said, process) = tokio::join!(show::said(&api, state), process);
    let mut vms = show::vms(state, Some(&said)).into_iter();
    let summary = vms.find(|vm| vm.name == name);
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
    // First, or it would be started again. One that is on its way is ended by this as soon as it is there.
    let stopped = run_not(&api, name.clone(), Some(0)).await?;
    if let Some(node) = node {
        let killed = api.ask(&view.state, node, act(&name, VmAct::Kill)).await;
        killed.map_err(|why| {
            unknown(format!(
                "{why}; VM {name} ends as soon as its node hears that it is to"
            ))
        })?;
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
    if process(&api, &name).await?["vmm"] == to.as_str() {
        // There is nothing to shut it down for.
        amend(&api, &name, &VmChange::Vmm(to)).await?;
        return Ok(StatusCode::NO_CONTENT);
    }
    let (before, now) = amend(&api, &name, &VmChange::Vmm(to.clone())).await?;
    if node.is_none() {
        return Ok(StatusCode::NO_CONTENT);
    }
    let Err(failure) = on_its_node(&api, &name, VmAct::Stop { seconds }).await else {
        return Ok(StatusCode::NO_CONTENT);
    };
    match process(&api, &name).await {
        // It goes on under the one of before, and is to be that after its next start too.
        Ok(process) if process.is_object() && process["vmm"] != to.as_str() => {
            let undone = Command::DescribeVm {
                name: name.clone(),
                of: Some(now),
                definition: before.definition,
                memory: before.memory,
                volumes: before.volumes,
            };
            match api.propose(undone).await {
                Ok(_) => Err(failure),
                Err(why) => Err(and(
                    failure,
                    format!("at its next start it will be under {to}: {}", why.1),
                )),
            }
        }
        Ok(_) => Ok(StatusCode::NO_CONTENT),
        Err(_) => Err(and(
            failure,
            format!("under {to} at its next start; `unibody vm status {name}` says whether it is by now"),
        )),
    }
}

/// Gives a VM another volume, at once if it runs, and for all its starts.
#[utoipa::path(post, path = "/v1/vms/{name}/volumes", params(("name" = String, Path)), request_body = VmVolume, responses((status = 204), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn add_volume(
    State(api): State<Api>,
    Path(name): Path<String>,
    Given(volume): Given<VmVolume>,
) -> Done {
    // From then on the volume belongs where the VM is, and every start that begins has it.
    amend(&api, &name, &VmChange::AddVolume(volume.clone())).await?;
    let Err(failure) = follow(&api, &name, &VmAct::AddVolume(volume.clone())).await else {
        return Ok(StatusCode::NO_CONTENT);
    };
    let volume = volume.volume;
    // Whether it was done is to be seen before anything is undone: the answer may be what was lost.
    match process(&api, &name).await {
        Ok(process) if has(&process, &volume) => Ok(StatusCode::NO_CONTENT),
        Ok(_) => {
            // As before, or a VM that could not take it would not start with it either. It may be taking it just now.
            let undone = async {
                amend(&api, &name, &VmChange::RemoveVolume(volume.clone())).await?;
                let off = VmAct::RemoveVolume {
                    volume: volume.clone(),
                    seconds: 10,
                };
                follow(&api, &name, &off).await
            };
            match undone.await {
                Ok(()) => Err(failure),
                Err(why) => Err(and(
                    failure,
                    format!("nor could it be undone ({}): remove volume {volume} again", why.1),
                )),
            }
        }
        Err(_) => Err(Failure(
            StatusCode::SERVICE_UNAVAILABLE,
            format!(
                "{}; VM {name} has volume {volume} at its next start, and `unibody vm status {name}` says whether it has it now",
                failure.1
            ),
        )),
    }
}

/// Whether a process has a volume.
fn has(process: &serde_json::Value, volume: &str) -> bool {
    let mut volumes = process["volumes"].as_array().into_iter().flatten();
    volumes.any(|has| has == volume)
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
    let off = VmAct::RemoveVolume {
        volume: volume.clone(),
        seconds,
    };
    // The volume is the VM's until its guest has let go of it.
    follow(&api, &name, &off).await?;
    amend(&api, &name, &VmChange::RemoveVolume(volume)).await?;
    // It may have been started meanwhile, as it was before.
    follow(&api, &name, &off).await?;
    Ok(StatusCode::NO_CONTENT)
}
