//! A node's Raft log, vote and snapshot on its disk: one file of the embedded database `redb`.
//!
//! Three tables: `meta` (identity, vote, committed and purged positions, the snapshot's description), `log` (entry by
//! index), `snapshot` (pieces of the last one). Values are JSON in an envelope with format number and checksum.
//!
//! Invariants:
//! * Whatever Raft is told is kept has been flushed, except the committed position, which is a hint: losing it only delays.
//! * The state machine lives in memory. After a start it is the snapshot, then Raft applies the log again; entries are purged
//!   only when a snapshot that covers them is durable. Raft asks for it earlier, while a snapshot is still being installed.
//! * A snapshot is never replaced by an older one. They are made beside the state machine, and one that was begun before the
//!   leader's was installed may be done after it.
//! * The file is locked by the process that has it open. A new file is a new node.
//!
//! Deliberately absent: repair. A damaged or foreign file is refused; the node joins anew with an empty directory.

use std::fmt::Debug;
use std::fs::File;
use std::ops::{Bound, RangeBounds};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use openraft::LogIdOptionExt;
use openraft::storage::{LogFlushed, LogState, RaftLogStorage, RaftStateMachine, Snapshot};
use openraft::{
    Entry, EntryPayload, LogId, OptionalSend, RaftLogReader, RaftSnapshotBuilder, SnapshotMeta, StorageError,
    StorageIOError, StoredMembership, Vote,
};
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::sync::watch;

use super::cluster::View;
use super::machine::{Machine, Receipt};
use super::{Contact, Types};
use crate::envelope::{self, Unreadable};
use crate::state::{NodeId, hex_u128};

pub(super) const FILE: &str = "cluster.redb";
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const SNAPSHOT: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("snapshot");

const IDENTITY_MAGIC: &str = "unibody node";
const META_MAGIC: &str = "unibody raft";
const ENTRY_MAGIC: &str = "unibody log entry";

/// Bytes of a snapshot in one value.
const PIECE: usize = 1 << 20;
/// Most bytes of entries handed out at once, beside the first entry.
const READ_MAX: usize = 4 << 20;
/// Bytes of the database's cache.
const CACHE: usize = 16 << 20;

/// Who this node is, from the making of its store to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Its number: random.
    pub node: NodeId,
    /// The store's: random.
    #[serde(with = "hex_u128")]
    pub store: u128,
    /// Nodes that it was told to join by; none: it was told to begin a cluster.
    pub seeds: Vec<String>,
}

/// Why the store can not be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The system said no.
    #[error("{doing} {path} failed")]
    System {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Another process has it.
    #[error("{0} is in use by a running node: stop that one, or give this one a --state of its own")]
    InUse(PathBuf),
    /// The database does not take the file.
    #[error(
        "{path} can not be used as a node's store: {why}. Nothing was changed; if it is lost, join the cluster anew with an empty directory"
    )]
    Database {
        /// The file.
        path: PathBuf,
        /// What the database says.
        why: String,
    },
    /// What is in it is not ours.
    #[error(
        "{path}: {what}: {why}. Nothing was changed; if it is lost, join the cluster anew with an empty directory"
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Which part.
        what: String,
        /// What is wrong with it.
        why: Unreadable,
    },
    /// There is a node already.
    #[error("{0} holds a node of a cluster already: start that, or use an empty directory")]
    Exists(PathBuf),
    /// There is none.
    #[error(
        "{0} holds no node of a cluster: begin one or join one first (if `node init` was interrupted there, remove node.json and repeat it)"
    )]
    Missing(PathBuf),
}

/// Anything the database or a document in it complains of.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    #[error("the node's store: {0}")]
    Database(#[from] redb::Error),
    #[error("the node's store: {0}: {1}")]
    Unreadable(String, Unreadable),
    #[error("the node's store: the log is not shortened, since the snapshot for it could not be installed")]
    Uncovered,
}

macro_rules! from_redb {
    ($($t:ty),*) => {$(
        impl From<$t> for Trouble {
            fn from(error: $t) -> Self {
                Trouble::Database(error.into())
            }
        }
    )*};
}
from_redb!(
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError,
    redb::SetDurabilityError
);

type Answer<T> = Result<T, Trouble>;
type Description = SnapshotMeta<NodeId, Contact>;
type KeptSnapshot = (Description, Vec<u8>);
type RaftResult<T> = Result<T, StorageError<NodeId>>;

/// The open file.
#[derive(Clone)]
pub(super) struct Store {
    db: Arc<Database>,
    pub(super) identity: Identity,
    covered: Arc<watch::Sender<Covered>>,
}

/// What the snapshot in the file makes superfluous.
#[derive(Clone, Copy, Debug, Default)]
struct Covered {
    /// Index of the first entry that is not in it.
    next: u64,
    /// A snapshot could not be installed, and Raft will hear of it: nothing is waited for any more.
    failed: bool,
}

impl Store {
    /// Opens the store in `dir`, or makes it for a new node.
    pub(super) fn open(dir: &Path, new: Option<&[String]>) -> Result<Self, StoreError> {
        let path = dir.join(FILE);
        let system = |doing, path: &Path| {
            let path = path.to_path_buf();
            move |source| StoreError::System { doing, path, source }
        };
        let database = |why: &dyn std::fmt::Display| StoreError::Database {
            path: path.clone(),
            why: why.to_string(),
        };
        crate::durable::make_directory(dir).map_err(system("making the directory", dir))?;
        if new.is_none() && !path.exists() {
            return Err(StoreError::Missing(dir.to_path_buf()));
        }
        let mut builder = Database::builder();
        builder.set_cache_size(CACHE);
        let db = builder.create(&path).map_err(|error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => StoreError::InUse(path.clone()),
            error => database(&error),
        })?;
        let trouble = |error: Trouble| match error {
            Trouble::Database(error) => database(&error),
            Trouble::Unreadable(what, why) => StoreError::Unreadable {
                path: path.clone(),
                what,
                why,
            },
            Trouble::Uncovered => database(&error),
        };
        let known = identity(&db).map_err(trouble)?;
        let identity = match (known, new) {
            (Some(_), Some(_)) => return Err(StoreError::Exists(dir.to_path_buf())),
            (None, None) => return Err(StoreError::Missing(dir.to_path_buf())),
            (Some(identity), None) => identity,
            (None, Some(seeds)) => {
                let identity = Identity {
                    // 1 to 2^53 - 1
                    node: NodeId((super::random() as u64 >> 11).max(1)),
                    store: super::random(),
                    seeds: seeds.to_vec(),
                };
                make(&db, &identity).map_err(trouble)?;
                File::open(dir)
                    .and_then(|dir| dir.sync_all())
                    .map_err(system("flushing the directory", dir))?;
                identity
            }
        };
        let store = Store {
            db: Arc::new(db),
            identity,
            covered: Arc::default(),
        };
        let kept: Option<Description> = store.get("snapshot").map_err(trouble)?;
        store.covers(kept.as_ref());
        Ok(store)
    }

    fn covers(&self, kept: Option<&Description>) {
        let next = kept.and_then(|kept| kept.last_log_id).next_index();
        self.covered
            .send_modify(|covered| covered.next = covered.next.max(next));
    }

    /// As if there were a snapshot of everything, for tests of the log alone.
    #[cfg(test)]
    pub(super) fn covers_all(&self) {
        self.covered.send_modify(|covered| covered.next = u64::MAX);
    }

    /// Waits until the entries up to `last` are in a durable snapshot.
    async fn wait_covered(&self, last: LogId<NodeId>) -> Answer<()> {
        let mut covered = self.covered.subscribe();
        let there = covered.wait_for(|covered| covered.failed || covered.next > last.index);
        match there.await {
            Ok(covered) if !covered.failed => Ok(()),
            // The sender is ours and stays.
            _ => Err(Trouble::Uncovered),
        }
    }

    /// The state machine as the last snapshot has it.
    pub(super) fn machine(&self) -> Answer<Machine> {
        match self.read_snapshot()? {
            Some((_, bytes)) => {
                Machine::decode(&bytes).map_err(|why| Trouble::Unreadable("the snapshot".into(), why))
            }
            None => Ok(Machine::default()),
        }
    }

    fn get<T: DeserializeOwned>(&self, key: &str) -> Answer<Option<T>> {
        get_from(&self.db.begin_read()?.open_table(META)?, key)
    }

    fn put(&self, key: &str, value: &impl Serialize, durability: Durability) -> Answer<()> {
        let mut write = self.db.begin_write()?;
        write.set_durability(durability)?;
        write
            .open_table(META)?
            .insert(key, envelope::seal(META_MAGIC, value).as_slice())?;
        Ok(write.commit()?)
    }

    fn append(&self, entries: &[Entry<Types>]) -> Answer<()> {
        let write = self.db.begin_write()?;
        {
            let mut table = write.open_table(LOG)?;
            for entry in entries {
                table.insert(entry.log_id.index, encode_entry(entry).as_slice())?;
            }
        }
        Ok(write.commit()?)
    }

    /// Takes entries away; with `purged`, everything up to there.
    fn remove(&self, range: impl RangeBounds<u64>, purged: Option<LogId<NodeId>>) -> Answer<()> {
        let write = self.db.begin_write()?;
        write.open_table(LOG)?.retain_in(range, |_, _| false)?;
        if let Some(purged) = purged {
            write
                .open_table(META)?
                .insert("purged", envelope::seal(META_MAGIC, &purged).as_slice())?;
        }
        Ok(write.commit()?)
    }

    fn entries(&self, range: (Bound<u64>, Bound<u64>), max_bytes: usize) -> Answer<Vec<Entry<Types>>> {
        let table = self.db.begin_read()?.open_table(LOG)?;
        let (mut found, mut bytes) = (Vec::new(), 0);
        for row in table.range(range)? {
            let (index, value) = row?;
            bytes += value.value().len();
            if bytes > max_bytes && !found.is_empty() {
                break;
            }
            found.push(decode_entry(index.value(), value.value())?);
        }
        Ok(found)
    }

    fn last(&self) -> Answer<Option<LogId<NodeId>>> {
        let table = self.db.begin_read()?.open_table(LOG)?;
        match table.last()? {
            Some((index, value)) => Ok(Some(decode_entry(index.value(), value.value())?.log_id)),
            None => Ok(None),
        }
    }

    /// Keeps a snapshot, unless there is a newer one.
    fn write_snapshot(&self, meta: &Description, bytes: &[u8]) -> Answer<()> {
        let write = self.db.begin_write()?;
        let kept: Option<Description> = get_from(&write.open_table(META)?, "snapshot")?;
        if kept.is_some_and(|kept| kept.last_log_id.next_index() > meta.last_log_id.next_index()) {
            return Ok(write.abort()?);
        }
        {
            let mut table = write.open_table(SNAPSHOT)?;
            table.retain(|_, _| false)?;
            for (number, piece) in (0u64..).zip(bytes.chunks(PIECE)) {
                table.insert(number, piece)?;
            }
            write
                .open_table(META)?
                .insert("snapshot", envelope::seal(META_MAGIC, meta).as_slice())?;
        }
        write.commit()?;
        self.covers(Some(meta));
        Ok(())
    }

    fn read_snapshot(&self) -> Answer<Option<KeptSnapshot>> {
        // One look: the pieces are those of the description.
        let read = self.db.begin_read()?;
        let Some(meta) = get_from(&read.open_table(META)?, "snapshot")? else {
            return Ok(None);
        };
        let table = read.open_table(SNAPSHOT)?;
        let mut bytes = Vec::new();
        for row in table.iter()? {
            bytes.extend_from_slice(row?.1.value());
        }
        Ok(Some((meta, bytes)))
    }
}

fn get_from<T: DeserializeOwned>(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    key: &str,
) -> Answer<Option<T>> {
    let Some(value) = table.get(key)? else {
        return Ok(None);
    };
    let value = envelope::open(META_MAGIC, value.value());
    value
        .map(Some)
        .map_err(|why| Trouble::Unreadable(key.to_owned(), why))
}

fn identity(db: &Database) -> Answer<Option<Identity>> {
    let read = db.begin_read()?;
    let table = match read.open_table(META) {
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
        table => table?,
    };
    let unreadable = |why| Trouble::Unreadable("the node's identity".into(), why);
    match table.get("identity")? {
        Some(value) => envelope::open(IDENTITY_MAGIC, value.value())
            .map(Some)
            .map_err(unreadable),
        None => Err(unreadable(Unreadable::Damaged("it is missing".into()))),
    }
}

fn make(db: &Database, identity: &Identity) -> Answer<()> {
    let write = db.begin_write()?;
    write
        .open_table(META)?
        .insert("identity", envelope::seal(IDENTITY_MAGIC, identity).as_slice())?;
    write.open_table(LOG)?;
    write.open_table(SNAPSHOT)?;
    Ok(write.commit()?)
}

/// An entry as the log keeps it.
pub(super) fn encode_entry(entry: &Entry<Types>) -> Vec<u8> {
    envelope::seal(ENTRY_MAGIC, entry)
}

/// The entry that the log keeps at `index`.
pub(super) fn decode_entry(index: u64, bytes: &[u8]) -> Answer<Entry<Types>> {
    let unreadable = |why| Trouble::Unreadable(format!("log entry {index}"), why);
    let entry: Entry<Types> = envelope::open(ENTRY_MAGIC, bytes).map_err(unreadable)?;
    if entry.log_id.index != index {
        return Err(unreadable(Unreadable::Damaged("it belongs elsewhere".into())));
    }
    Ok(entry)
}

/// A log entry's bytes, for fuzzing: as they are, and in an intact envelope. Never panics unless what can be read does not
/// survive being written.
pub fn fuzz_log(bytes: &[u8]) {
    let sealed = std::str::from_utf8(bytes)
        .ok()
        .and_then(|text| serde_json::value::RawValue::from_string(text.to_owned()).ok())
        .map(|raw| envelope::seal_raw(ENTRY_MAGIC, &raw));
    for bytes in std::iter::once(bytes).chain(sealed.as_deref()) {
        if let Ok(read) = envelope::open::<Entry<Types>>(ENTRY_MAGIC, bytes) {
            let again = encode_entry(&read);
            assert!(
                decode_entry(read.log_id.index, &again).is_ok_and(|again| again == read),
                "an entry that can be read can be written"
            );
        }
    }
}

/// Work on the file, where waiting for the disk holds up nobody else.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Answer<T> + Send + 'static,
    error: impl FnOnce(&Trouble) -> StorageIOError<NodeId>,
) -> RaftResult<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(trouble)) => Err(error(&trouble).into()),
        Err(gone) => Err(StorageIOError::write(&gone).into()),
    }
}

/// The log, as Raft uses it.
#[derive(Clone)]
pub(super) struct LogStore(pub(super) Store);

impl RaftLogReader<Types> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> RaftResult<Vec<Entry<Types>>> {
        let (store, range) = (
            self.0.clone(),
            (range.start_bound().cloned(), range.end_bound().cloned()),
        );
        blocking(
            move || store.entries(range, usize::MAX),
            |e| StorageIOError::read_logs(e),
        )
        .await
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> RaftResult<Vec<Entry<Types>>> {
        let (store, range) = (self.0.clone(), (Bound::Included(start), Bound::Excluded(end)));
        blocking(
            move || store.entries(range, READ_MAX),
            |e| StorageIOError::read_logs(e),
        )
        .await
    }
}

impl RaftLogStorage<Types> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> RaftResult<LogState<Types>> {
        let store = self.0.clone();
        let read = move || {
            let purged = store.get("purged")?;
            Ok(LogState {
                last_log_id: store.last()?.or(purged),
                last_purged_log_id: purged,
            })
        };
        blocking(read, |e| StorageIOError::read_logs(e)).await
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<NodeId>) -> RaftResult<()> {
        let (store, vote) = (self.0.clone(), *vote);
        blocking(
            move || store.put("vote", &vote, Durability::Immediate),
            |e| StorageIOError::write_vote(e),
        )
        .await
    }

    async fn read_vote(&mut self) -> RaftResult<Option<Vote<NodeId>>> {
        let store = self.0.clone();
        blocking(move || store.get("vote"), |e| StorageIOError::read_vote(e)).await
    }

    async fn save_committed(&mut self, committed: Option<LogId<NodeId>>) -> RaftResult<()> {
        let store = self.0.clone();
        blocking(
            move || store.put("committed", &committed, Durability::None),
            |e| StorageIOError::write_logs(e),
        )
        .await
    }

    async fn read_committed(&mut self) -> RaftResult<Option<LogId<NodeId>>> {
        let store = self.0.clone();
        let read = move || Ok(store.get::<Option<LogId<NodeId>>>("committed")?.flatten());
        blocking(read, |e| StorageIOError::read_logs(e)).await
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<Types>) -> RaftResult<()>
    where
        I: IntoIterator<Item = Entry<Types>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let (store, entries) = (self.0.clone(), entries.into_iter().collect::<Vec<_>>());
        blocking(move || store.append(&entries), |e| StorageIOError::write_logs(e)).await?;
        callback.log_io_completed(Ok(()));
        Ok(())
    }

    async fn truncate(&mut self, log_id: LogId<NodeId>) -> RaftResult<()> {
        let store = self.0.clone();
        blocking(
            move || store.remove(log_id.index.., None),
            |e| StorageIOError::write_logs(e),
        )
        .await
    }

    async fn purge(&mut self, log_id: LogId<NodeId>) -> RaftResult<()> {
        let store = self.0.clone();
        let covered = store.wait_covered(log_id).await;
        covered.map_err(|trouble| StorageIOError::write_logs(&trouble))?;
        blocking(
            move || store.remove(..=log_id.index, Some(log_id)),
            |e| StorageIOError::write_logs(e),
        )
        .await
    }
}

/// The state machine, as Raft uses it.
pub(super) struct MachineStore {
    store: Store,
    machine: Machine,
    views: watch::Sender<Arc<View>>,
}

impl MachineStore {
    pub(super) fn new(store: Store, machine: Machine, views: watch::Sender<Arc<View>>) -> Self {
        MachineStore {
            store,
            machine,
            views,
        }
    }

    fn publish(&self) {
        let view = View::of(&self.machine);
        self.views.send_replace(Arc::new(view));
    }
}

impl RaftStateMachine<Types> for MachineStore {
    type SnapshotBuilder = Builder;

    async fn applied_state(
        &mut self,
    ) -> RaftResult<(Option<LogId<NodeId>>, StoredMembership<NodeId, Contact>)> {
        Ok((self.machine.applied, self.machine.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> RaftResult<Vec<Receipt>>
    where
        I: IntoIterator<Item = Entry<Types>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut receipts = Vec::new();
        for entry in entries {
            self.machine.applied = Some(entry.log_id);
            receipts.push(match entry.payload {
                EntryPayload::Blank => Receipt::Nothing,
                EntryPayload::Normal(request) => self.machine.apply(&request, entry.log_id.leader_id.term),
                EntryPayload::Membership(membership) => {
                    self.machine.membership = StoredMembership::new(Some(entry.log_id), membership);
                    Receipt::Nothing
                }
            });
        }
        self.publish();
        Ok(receipts)
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        Builder {
            store: self.store.clone(),
            machine: self.machine.clone(),
        }
    }

    async fn begin_receiving_snapshot(&mut self) -> RaftResult<Box<Vec<u8>>> {
        Ok(Box::default())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta<NodeId, Contact>,
        snapshot: Box<Vec<u8>>,
    ) -> RaftResult<()> {
        let (store, kept) = (self.store.clone(), meta.clone());
        let install = move || {
            let machine = Machine::decode(&snapshot)
                .map_err(|why| Trouble::Unreadable("the leader's snapshot".into(), why))?;
            store.write_snapshot(&kept, &snapshot)?;
            Ok(machine)
        };
        let signature = meta.signature();
        let installed = blocking(install, |e| StorageIOError::write_snapshot(Some(signature), e)).await;
        let mut machine = installed.inspect_err(|_| {
            self.store.covered.send_modify(|covered| covered.failed = true);
        })?;
        (machine.applied, machine.membership) = (meta.last_log_id, meta.last_membership.clone());
        self.machine = machine;
        self.publish();
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> RaftResult<Option<Snapshot<Types>>> {
        let store = self.store.clone();
        let found = blocking(
            move || store.read_snapshot(),
            |e| StorageIOError::read_snapshot(None, e),
        )
        .await?;
        Ok(found.map(|(meta, bytes)| Snapshot {
            meta,
            snapshot: Box::new(bytes),
        }))
    }
}

/// Makes a snapshot of the state as it was when it was asked for.
pub(super) struct Builder {
    store: Store,
    machine: Machine,
}

impl RaftSnapshotBuilder<Types> for Builder {
    async fn build_snapshot(&mut self) -> RaftResult<Snapshot<Types>> {
        let (store, machine) = (self.store.clone(), self.machine.clone());
        let last = machine.applied;
        let meta = SnapshotMeta {
            last_log_id: last,
            last_membership: machine.membership.clone(),
            snapshot_id: last.map_or_else(
                || "none".into(),
                |last| format!("{}-{}", last.leader_id, last.index),
            ),
        };
        let kept = meta.clone();
        let build = move || {
            let bytes = machine.encode();
            store.write_snapshot(&kept, &bytes)?;
            Ok(bytes)
        };
        let bytes = blocking(build, |e| StorageIOError::write_snapshot(None, e)).await?;
        Ok(Snapshot {
            meta,
            snapshot: Box::new(bytes),
        })
    }
}
