//! The store against Raft's own test suite, and against files that are not ours.

use openraft::StorageError;
use openraft::testing::{StoreBuilder, Suite};
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
        Ok((dir, LogStore(store), machine))
    }
}

#[test]
fn the_store_passes_the_suite_of_openraft() {
    Suite::test_all(Fresh).unwrap();
}
