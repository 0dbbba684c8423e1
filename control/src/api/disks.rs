//! Taking a disk out: one that can be read keeps what it has until that is elsewhere; of one that can not be read the operator
//! says whether it is gone for good.

use std::collections::{BTreeMap, BTreeSet};

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;

use super::act::{Done, done};
use super::types::GivenUp;
use super::{Api, Failure, conflict, show};
use crate::state::{Command, Disk, Replica, ReplicaState, State as Control};

/// Takes a disk out for good: what is on it moves to others, then it is forgotten. Refused where something on it could be
/// lost for it.
#[utoipa::path(delete, path = "/v1/disks/{disk}", params(("disk" = String, Path, description = "its identity")), responses((status = 204), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn remove_disk(State(api): State<Api>, Path(name): Path<String>) -> Done {
    let looked = Looked::at(&api, &name).await?;
    let disk = looked.disk.0;
    if looked.can_be_read(looked.disk) {
        return api.propose(Command::DiskLeave { disk }).await.map(done);
    }
    let alone = looked.alone();
    if !alone.is_empty() {
        let why = format!(
            "disk {name} can not be read, and no other copy of {} can be read now: put it or the disks with the other \
             copies back into service first. If it is gone for good, `unibody disk remove {name} --lost` gives up what is on it",
            parts(&alone)
        );
        return Err(conflict(why));
    }
    api.propose(Command::DiskOut { disk }).await.map(done)
}

/// Gives up what is on a disk that can not be read: its copies count no more where the state knows another one. Parts of
/// volumes without another copy that can be read are in the answer: they can be read again only if one of their disks returns.
#[utoipa::path(post, path = "/v1/disks/{disk}/give-up", params(("disk" = String, Path, description = "its identity")), responses((status = 200, body = GivenUp), (status = "4XX", body = super::types::Problem)))]
pub(super) async fn give_up_disk(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<Json<GivenUp>, Failure> {
    let looked = Looked::at(&api, &name).await?;
    if looked.can_be_read(looked.disk) {
        let why = format!(
            "disk {name} is in service, and what is on it can be moved: remove it without --lost, or fail it before"
        );
        return Err(conflict(why));
    }
    let unreadable = looked.alone();
    let disk = looked.disk.0;
    api.propose(Command::DiskOut { disk }).await?;
    Ok(Json(GivenUp { unreadable }))
}

/// The state, and which disks are in service now.
struct Looked {
    state: std::sync::Arc<Control>,
    online: BTreeSet<String>,
    disk: Disk,
}

impl Looked {
    async fn at(api: &Api, name: &str) -> Result<Self, Failure> {
        let (view, _) = api.view().await;
        let mut disks = view.state.disks.keys();
        let Some(&disk) = disks.find(|known| known.to_string() == name) else {
            let why = format!("there is no disk {name}: name it by its identity, see `unibody disk list`");
            return Err(Failure(StatusCode::NOT_FOUND, why));
        };
        let said = show::said(api, &view.state).await;
        let disks = said.into_values().flat_map(|node| node.disks);
        let online = disks.filter(|disk| disk.state == "online");
        Ok(Looked {
            state: std::sync::Arc::clone(&view.state),
            online: online.map(|disk| disk.uuid).collect(),
            disk,
        })
    }

    fn can_be_read(&self, disk: Disk) -> bool {
        self.online.contains(&disk.to_string())
    }

    fn alone(&self) -> BTreeMap<String, u64> {
        alone_on(&self.state, self.disk, |disk| self.can_be_read(disk))
    }
}

/// Of each volume the chunks that are in sync on a disk and on no other that can be read.
fn alone_on(state: &Control, disk: Disk, can_be_read: impl Fn(Disk) -> bool) -> BTreeMap<String, u64> {
    let is_alone = |slots: &&Vec<Replica>| {
        let mut in_sync = slots.iter().filter(|slot| slot.state == ReplicaState::InSync);
        in_sync.clone().any(|slot| slot.disk == disk)
            && !in_sync.any(|slot| slot.disk != disk && can_be_read(slot.disk))
    };
    let volumes = state.volumes.iter();
    let counted = volumes.map(|(name, volume)| {
        let alone = volume.chunks.iter().filter(is_alone);
        (name.clone(), alone.count() as u64)
    });
    counted.filter(|(_, chunks)| *chunks > 0).collect()
}

/// For people: so much of these volumes.
fn parts(alone: &BTreeMap<String, u64>) -> String {
    let each = alone
        .iter()
        .map(|(volume, chunks)| format!("{chunks} chunks of volume {volume}"));
    each.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use unibody_dataplane::ids::DiskUuid;

    use super::*;
    use crate::state::NodeId;

    #[test]
    fn what_would_be_lost_with_a_disk_is_counted() {
        let mut state = Control::default();
        let disks = [1, 2].map(|disk| {
            let add = Command::AddDisk {
                disk: DiskUuid(disk),
                node: NodeId::LOCAL,
                domain: disk.to_string(),
                bytes: 1 << 30,
            };
            state.apply(&add).unwrap();
            DiskUuid(disk)
        });
        let create = |name: &str, disks: &[DiskUuid], chunks: usize| Command::CreateVolume {
            name: name.into(),
            size: (chunks as u64) << 26,
            mirror: disks.len() as u32,
            stripe_unit: 1 << 18,
            stripe_width: 1,
            read_only: false,
            instance: 1,
            chunks: vec![disks.to_vec(); chunks],
        };
        state.apply(&create("v", &disks, 2)).unwrap();
        state.apply(&create("w", &disks[..1], 3)).unwrap();
        let [one, two] = disks.map(Disk);
        let alone = |state: &Control, disk, readable: &[Disk]| {
            alone_on(state, disk, |disk| readable.contains(&disk))
                .into_iter()
                .collect::<Vec<_>>()
        };
        let of = |parts: &[(&str, u64)]| -> Vec<(String, u64)> {
            parts
                .iter()
                .map(|&(name, chunks)| (name.into(), chunks))
                .collect()
        };
        assert_eq!(alone(&state, one, &[two]), of(&[("w", 3)]));
        assert_eq!(alone(&state, two, &[one]), of(&[]));
        // Both copies are away: neither is the one to be given up.
        assert_eq!(alone(&state, one, &[]), of(&[("v", 2), ("w", 3)]));
        assert_eq!(alone(&state, two, &[]), of(&[("v", 2)]));
        state.apply(&Command::DiskOut { disk: two.0 }).unwrap();
        assert_eq!(alone(&state, two, &[]), of(&[]), "it is not in sync there");
        assert_eq!(alone(&state, one, &[]), of(&[("v", 2), ("w", 3)]));
    }
}
