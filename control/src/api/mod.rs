//! The HTTP API of a node: what operators, their programs and other nodes ask of the cluster. Any node answers.
//!
//! Reads show the newest committed state where a majority can be asked, and say so where not. Writes are proposals: whichever
//! node takes one, the leader decides it. What only one certain node can do is passed on to it.
//!
//! * `types`: what is taken and given
//! * `show`: the state of the cluster, and the stream of its changes
//! * `act`: everything that changes something; `disks`: taking disks out
//! * `machine`: what is done to a VM that runs
//! * `metrics`, `metric_names`: counters of this node for Prometheus, and what they are
//!
//! Every request carries the cluster's API token (`authorization: Bearer TOKEN`); without it nothing of the request is read
//! beyond its head. Bodies, heads, connections and the time for a head are bounded. Absent: secrecy; put the port on a
//! network of the cluster's own, or behind a proxy that speaks TLS.

mod act;
mod disks;
mod machine;
mod metric_names;
mod metrics;
mod show;
#[cfg(test)]
mod tests;
pub mod types;

use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::sync::Semaphore;
use utoipa::OpenApi;

use crate::cluster::vms::{VmAct, VmHost};
use crate::cluster::{Agent, AgentHandle, LocalAnswer, LocalRequest, Reports};
use crate::planner::PlanError;
use crate::raft::{Cluster, ProposeError, View};
use crate::state::{Applied, Command, NodeId, Refused, State as Control};
use types::Problem;

/// Longest body, bytes.
const BODY_MAX: usize = 256 << 10;
/// Connections at a time.
const CONNECTIONS_MAX: usize = 256;
/// Time for the head of a request, also of the next one on a connection.
const HEAD: Duration = Duration::from_secs(15);
/// How long a change may take to be decided.
const DECISION: Duration = Duration::from_secs(20);
/// Between two attempts at a change.
const PAUSE: Duration = Duration::from_millis(100);
/// How long a majority is waited for before the state is shown as it is here.
const CONFIRM: Duration = Duration::from_secs(2);
/// How long another node may take to connect.
const REACH: Duration = Duration::from_secs(1);
/// How long another node may take to say how it is.
const SAY: Duration = Duration::from_secs(3);
/// Says that a node passed a request on. Whoever that was wrong for must not pass it on again: the address may be its own.
const PASSED_ON: &str = "x-unibody-passed-on";
/// How often the leader asks the nodes about their disks.
const LOOK: Duration = Duration::from_secs(5);
/// How long another node may take to do something.
const DO: Duration = Duration::from_secs(60);

/// What the handlers use.
struct Inner {
    agent: AgentHandle,
    cluster: Arc<Cluster>,
    host: Arc<dyn VmHost>,
    token: String,
    me: NodeId,
}

/// See the module.
#[derive(Clone)]
struct Api(Arc<Inner>);

/// Why a request was not fulfilled.
#[derive(Debug)]
struct Failure(StatusCode, String);

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, Json(Problem { error: self.1 })).into_response()
    }
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        let status = match &refused {
            Refused::NoVolume(_) | Refused::NoDisk(_) | Refused::NoNode(_) | Refused::NoVm(_) => {
                StatusCode::NOT_FOUND
            }
            Refused::Name(_)
            | Refused::Size(_)
            | Refused::Shrink { .. }
            | Refused::Mirror(_)
            | Refused::Geometry(_)
            | Refused::Node(_)
            | Refused::Vm(_) => StatusCode::BAD_REQUEST,
            _ => StatusCode::CONFLICT,
        };
        Failure(status, refused.to_string())
    }
}

fn wrong(why: impl Into<String>) -> Failure {
    Failure(StatusCode::BAD_REQUEST, why.into())
}

fn conflict(why: impl Into<String>) -> Failure {
    Failure(StatusCode::CONFLICT, why.into())
}

impl From<PlanError> for Failure {
    fn from(error: PlanError) -> Self {
        match error {
            PlanError::Domains { .. } | PlanError::Full { .. } => conflict(error.to_string()),
            PlanError::TooMuch { .. } => wrong(error.to_string()),
        }
    }
}

/// The API as a document that programs read (`docs/formats/openapi.json`).
#[derive(OpenApi)]
#[openapi(
    info(title = "Unibody", description = "Volumes, disks, VMs and nodes of a cluster. Every request carries the API token of the cluster."),
    paths(
        show::status, show::watch, metrics::metrics,
        act::create_volume, act::resize_volume, act::delete_volume, act::attach_volume,
        act::define_vm, act::start_vm, act::stop_vm, act::delete_vm,
        act::drain_node, act::remove_node, disks::remove_disk, disks::give_up_disk, act::command,
        machine::vm, machine::kill_vm, machine::pause_vm, machine::resume_vm, machine::swap_vm,
        machine::add_volume, machine::remove_volume,
    ),
    components(schemas(types::Problem, types::Changes)),
    modifiers(&Token),
    security(("token" = []))
)]
struct Document;

/// How requests prove that they may be made.
struct Token;

impl utoipa::Modify for Token {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
        if let Some(components) = &mut document.components {
            let bearer = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
            components.add_security_scheme("token", bearer);
        }
    }
}

/// The OpenAPI text of this version.
pub fn document() -> String {
    Document::openapi()
        .to_pretty_json()
        .expect("a document has string keys only")
        + "\n"
}

/// Any bytes as the body of each request: what is understood can be said again and means the same. For the fuzzer.
#[doc(hidden)]
pub fn fuzz_body(bytes: &[u8]) {
    fn body<T: serde::de::DeserializeOwned + serde::Serialize + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
        if let Ok(value) = serde_json::from_slice::<T>(bytes) {
            let again = serde_json::to_vec(&value).expect("a body has string keys only");
            assert_eq!(
                value,
                serde_json::from_slice(&again).expect("what was written can be read")
            );
        }
    }
    body::<types::NewVolume>(bytes);
    body::<types::Resize>(bytes);
    body::<types::OnNode>(bytes);
    body::<types::VmDefinition>(bytes);
    body::<types::Drain>(bytes);
    body::<types::Swap>(bytes);
    body::<types::VolumeOff>(bytes);
    body::<types::VmStop>(bytes);
    body::<crate::cluster::vms::VmVolume>(bytes);
    body::<LocalRequest>(bytes);
}

/// Serves the users of a node for as long as it runs.
///
/// # Panics
/// When the users of this agent are served already.
pub fn serve(agent: &mut Agent, host: Arc<dyn VmHost>) {
    let mut users = agent.users().expect("users are served once");
    let cluster = agent.cluster();
    let api = Api(Arc::new(Inner {
        agent: agent.handle(),
        me: cluster.identity().node,
        token: agent.config().api_token(),
        cluster,
        host,
    }));
    agent.runtime().spawn(look_at_disks(api.clone(), agent.reports()));
    let router = router(api);
    agent.runtime().spawn(async move {
        let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        while let Some(stream) = users.recv().await {
            // Too many: whoever called sees a closed connection, and the others are served.
            let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
                continue;
            };
            let router = router.clone();
            tokio::spawn(async move {
                // It may have hung up already.
                converse(stream, router).await.ok();
                drop(permit);
            });
        }
    });
}

/// Asks all nodes about their disks again and again while this one leads: what they say decides what moves.
async fn look_at_disks(api: Api, reports: Arc<Reports>) {
    let mut due = tokio::time::interval(LOOK);
    due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        due.tick().await;
        if api.0.cluster.is_leader() {
            let view = api.0.cluster.view();
            reports.say(&view.state, &show::disks_said(&api, &view.state).await);
        }
    }
}

async fn converse(stream: TcpStream, router: Router) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    let stream = TokioIo::new(tokio::net::TcpStream::from_std(stream)?);
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(64 << 10)
        .serve_connection(stream, TowerToHyperService::new(router))
        .await?;
    Ok(())
}

fn router(api: Api) -> Router {
    Router::new()
        .route("/v1/status", get(show::status))
        .route("/v1/watch", get(show::watch))
        .route("/v1/volumes", post(act::create_volume))
        .route("/v1/volumes/{name}", delete(act::delete_volume))
        .route("/v1/volumes/{name}/resize", post(act::resize_volume))
        .route("/v1/volumes/{name}/attach", post(act::attach_volume))
        .route(
            "/v1/vms/{name}",
            get(machine::vm).put(act::define_vm).delete(act::delete_vm),
        )
        .route("/v1/vms/{name}/start", post(act::start_vm))
        .route("/v1/vms/{name}/stop", post(act::stop_vm))
        .route("/v1/vms/{name}/kill", post(machine::kill_vm))
        .route("/v1/vms/{name}/pause", post(machine::pause_vm))
        .route("/v1/vms/{name}/resume", post(machine::resume_vm))
        .route("/v1/vms/{name}/swap", post(machine::swap_vm))
        .route("/v1/vms/{name}/volumes", post(machine::add_volume))
        .route("/v1/vms/{name}/volumes/remove", post(machine::remove_volume))
        .route("/v1/nodes/{node}", delete(act::remove_node))
        .route("/v1/nodes/{node}/drain", post(act::drain_node))
        .route("/v1/nodes/{node}/command", post(act::command))
        .route("/v1/disks/{disk}", delete(disks::remove_disk))
        .route("/v1/disks/{disk}/give-up", post(disks::give_up_disk))
        .route("/v1/openapi.json", get(async || document()))
        .route("/metrics", get(metrics::metrics))
        .fallback(async || {
            Failure(
                StatusCode::NOT_FOUND,
                "there is nothing here: see /v1/openapi.json".into(),
            )
        })
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .layer(axum::middleware::from_fn_with_state(api.clone(), admit))
        .with_state(api)
}

/// Lets only those in who know the token.
async fn admit(State(api): State<Api>, request: Request, next: Next) -> Response {
    let given = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "))
        .unwrap_or_default();
    // Hashes are compared in constant time.
    if blake3::hash(given.as_bytes()) == blake3::hash(api.0.token.as_bytes()) {
        return next.run(request).await;
    }
    Failure(
        StatusCode::UNAUTHORIZED,
        "the API token is missing or wrong: `unibody node token --api` prints it on a node".into(),
    )
    .into_response()
}

impl Api {
    /// The state, and whether a majority confirmed that it is the newest.
    async fn view(&self) -> (Arc<View>, bool) {
        let cluster = &self.0.cluster;
        match tokio::time::timeout(CONFIRM, cluster.confirmed_later()).await {
            Ok(Ok(view)) => (view, true),
            _ => (cluster.view(), false),
        }
    }

    /// Proposes until the outcome is known; what is refused is a failure.
    async fn propose(&self, command: Command) -> Result<Applied, Failure> {
        Ok(self.decide(command).await??)
    }

    /// Proposes until the outcome is known.
    async fn decide(&self, command: Command) -> Result<Result<Applied, Refused>, Failure> {
        let cluster = &self.0.cluster;
        let request = cluster.request();
        let end = tokio::time::Instant::now() + DECISION;
        loop {
            let error = match cluster.propose_later(request, command.clone()).await {
                Ok(applied) => return Ok(Ok(applied)),
                Err(ProposeError::Refused(refused)) => return Ok(Err(refused)),
                Err(error @ ProposeError::TooLong(_)) => return Err(wrong(error.to_string())),
                Err(error @ ProposeError::Forgotten) => {
                    return Err(Failure(StatusCode::SERVICE_UNAVAILABLE, error.to_string()));
                }
                Err(error) => error,
            };
            if tokio::time::Instant::now() >= end {
                let why = format!("{error}: see `unibody status` for whether it was done");
                return Err(Failure(StatusCode::SERVICE_UNAVAILABLE, why));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Has a node do something that only it can do.
    async fn ask(&self, state: &Control, node: NodeId, request: LocalRequest) -> LocalAnswer {
        let patience = match request {
            LocalRequest::Status
            | LocalRequest::Vm {
                act: VmAct::Status, ..
            } => SAY,
            _ => DO + request.patience(),
        };
        if node == self.0.me {
            if let LocalRequest::Vm { act, .. } = &request {
                // What a VM is may have been changed just before this, and it may be started anew right after.
                let (_, confirmed) = self.view().await;
                if act.is_of_the_newest() && !confirmed {
                    return Err("no majority of the nodes answers: try again when one does".into());
                }
            }
            let answer = tokio::time::timeout(patience, self.0.agent.ask(request)).await;
            return answer.unwrap_or_else(|_| Err("the node is busy".into()));
        }
        let Some(record) = state.nodes.get(&node) else {
            return Err(format!("there is no node {node}"));
        };
        let (name, addresses) = (record.name.clone(), record.addresses.clone());
        let token = self.0.token.clone();
        let asked =
            tokio::task::spawn_blocking(move || ask_far(&name, &addresses, node, &token, &request, patience));
        asked.await.unwrap_or_else(|error| Err(error.to_string()))
    }
}

/// Asks a node by way of its own API.
fn ask_far(
    name: &str,
    addresses: &[String],
    node: NodeId,
    token: &str,
    request: &LocalRequest,
    patience: Duration,
) -> LocalAnswer {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_connect(Some(REACH))
        .timeout_global(Some(patience))
        .http_status_as_error(false)
        .proxy(None)
        .build()
        .into();
    let mut last = String::from("it has no address");
    for address in addresses {
        let asked = agent
            .post(format!("http://{address}/v1/nodes/{node}/command"))
            .header("authorization", format!("Bearer {token}"))
            .header(PASSED_ON, "1")
            .send_json(request);
        match asked {
            Ok(mut answer) => {
                let fine = answer.status().is_success();
                let body = answer.body_mut();
                return match fine {
                    true => body.read_json().map_err(|error| format!("node {name}: {error}")),
                    false => Err(body
                        .read_json::<Problem>()
                        .map_or_else(|error| format!("node {name}: {error}"), |problem| problem.error)),
                };
            }
            // Once it is connected it may have been done: another address would do it again.
            Err(error @ (ureq::Error::Io(_) | ureq::Error::ConnectionFailed | ureq::Error::HostNotFound)) => {
                last = error.to_string();
            }
            Err(error) => return Err(format!("node {name} did not answer: {error}")),
        }
    }
    Err(format!("node {name} can not be reached: {last}"))
}

/// The node of a name or number.
fn find_node(state: &Control, name: &str) -> Result<NodeId, Failure> {
    let mut nodes = state.nodes.iter();
    let found = nodes.find(|(id, node)| node.name == name || id.to_string() == name);
    found.map(|(id, _)| *id).ok_or_else(|| {
        let names: Vec<_> = state.nodes.values().map(|node| node.name.as_str()).collect();
        let why = format!("there is no node {name}; there are {}", names.join(", "));
        Failure(StatusCode::NOT_FOUND, why)
    })
}

/// What a node is called.
fn name_of(state: &Control, node: NodeId) -> String {
    let record = state.nodes.get(&node);
    record.map_or_else(|| node.to_string(), |record| record.name.clone())
}
