//! The store against Raft's own test suite, and against files that are not ours.

use std::time::Duration;

use openraft::storage::{RaftLogStorage, RaftStateMachine};
use openraft::testing::{StoreBuilder, Suite};
use openraft::{CommittedLeaderId, Entry, EntryPayload, LogId, RaftSnapshotBuilder, Snapshot, StorageError};
use tempfile::TempDir;
use tokio::sync::watch;

use super::store::{LogStore, MachineStore, Store};
use super::*;

struct Fresh;

impl StoreBuilder<Types, LogStore, MachineStore, TempDir> for Fresh {
    async fn build(&self) -> Result<(TempDir, LogStore, MachineStore), StorageError<NodeId>> {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path(), Some(&[])).expect("a new store");
        let machine = store.machine().expect("an empty machine");
        let views = watch::Sender::new(Default::default());
        let machine = MachineStore::new(store.clone(), machine, views);
        // The suite shortens the log where it likes.
        store.covers_all();
        Ok((dir, LogStore(store), machine))
    }
}

#[test]
fn the_store_passes_the_suite_of_openraft() {
    Suite::test_all(Fresh).unwrap();
}

fn open(dir: &TempDir, new: bool) -> (Store, MachineStore) {
    let store = Store::open(dir.path(), new.then_some(&[])).unwrap();
    let machine = store.machine().unwrap();
    let views = watch::Sender::new(Default::default());
    (store.clone(), MachineStore::new(store, machine, views))
}

fn at(index: u64) -> LogId<NodeId> {
    LogId::new(CommittedLeaderId::new(1, NodeId(1)), index)
}

/// Applies entries up to an index.
async fn apply(machine: &mut MachineStore, last: u64) {
    let first = machine.applied_state().await.unwrap().0;
    let first = first.map_or(0, |applied| applied.index + 1);
    let entries = (first..=last).map(|index| Entry::<Types> {
        log_id: at(index),
        payload: EntryPayload::Blank,
    });
    machine.apply(entries.collect::<Vec<_>>()).await.unwrap();
}

/// As a leader would send it.
async fn snapshot(last: u64) -> Snapshot<Types> {
    let dir = tempfile::tempdir().unwrap();
    let (_store, mut machine) = open(&dir, true);
    apply(&mut machine, last).await;
    let mut builder = machine.get_snapshot_builder().await;
    builder.build_snapshot().await.unwrap()
}

/// Raft wants the log shortened as soon as it has handed over the snapshot, and the process may end before that is kept.
#[tokio::test]
async fn the_log_is_not_shortened_before_the_snapshot_for_it_is_durable() {
    let dir = tempfile::tempdir().unwrap();
    let (store, mut machine) = open(&dir, true);
    let mut log = LogStore(store.clone());
    let leaders = snapshot(7).await;
    {
        let mut purging = std::pin::pin!(log.purge(at(7)));
        // However long that takes.
        let early = tokio::time::timeout(Duration::from_millis(200), purging.as_mut()).await;
        assert!(early.is_err(), "it was not waited for");
        let kept = LogStore(store.clone()).get_log_state().await.unwrap();
        assert_eq!(kept.last_purged_log_id, None);
        machine
            .install_snapshot(&leaders.meta, leaders.snapshot)
            .await
            .unwrap();
        purging.await.unwrap();
    }
    assert_eq!(log.get_log_state().await.unwrap().last_purged_log_id, Some(at(7)));
    drop((log, store, machine));
    // The next process knows it as well.
    let (store, _machine) = open(&dir, false);
    LogStore(store).purge(at(7)).await.unwrap();
}

#[tokio::test]
async fn a_snapshot_that_can_not_be_installed_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let (store, mut machine) = open(&dir, true);
    let meta = snapshot(7).await.meta;
    let garbage = Box::new(b"no snapshot".to_vec());
    machine.install_snapshot(&meta, garbage).await.unwrap_err();
    LogStore(store).purge(at(7)).await.unwrap_err();
}

/// Snapshots are made beside the state machine: one that was begun before the leader's came may be done after it.
#[tokio::test]
async fn an_older_snapshot_never_replaces_a_newer_one() {
    let dir = tempfile::tempdir().unwrap();
    let (store, mut machine) = open(&dir, true);
    apply(&mut machine, 3).await;
    let mut slow = machine.get_snapshot_builder().await;
    let leaders = snapshot(7).await;
    machine
        .install_snapshot(&leaders.meta, leaders.snapshot)
        .await
        .unwrap();
    slow.build_snapshot().await.unwrap();
    let kept = machine.get_current_snapshot().await.unwrap().unwrap();
    assert_eq!(kept.meta.last_log_id, Some(at(7)));
    drop((slow, store, machine));
    let (_store, mut machine) = open(&dir, false);
    assert_eq!(machine.applied_state().await.unwrap().0, Some(at(7)));
}
