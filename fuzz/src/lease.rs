//! A lease on disk.

use std::cell::RefCell;
use std::time::Duration;

use mig_hook::lease::{Lease, VERSION};
use mig_hook::store::{Lock, Store};
use serde_json::Value;
use tempfile::TempDir;

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

struct State {
    dir: TempDir,
    store: Store,
    lock: Lock,
}

thread_local! {
    static STATE: RefCell<State> = RefCell::new(fresh());
}

fn fresh() -> State {
    let dir = tempfile::Builder::new().prefix("mig-fuzz").tempdir().unwrap();
    let store = Store::open(&dir.path().join("state")).unwrap();
    let lock = store.lock(Duration::ZERO).unwrap();
    State { dir, store, lock }
}

pub fn check(data: &[u8]) {
    STATE.with_borrow(|state| read_and_write(state, data));
}

fn read_and_write(state: &State, data: &[u8]) {
    let path = state.dir.path().join("state/leases").join(format!("{TOKEN}.json"));
    std::fs::write(&path, data).unwrap();
    let read = state.store.get::<Lease>(TOKEN, VERSION);
    let lease = match read {
        Ok(lease) => lease.expect("the file is there"),
        Err(error) => {
            let error = error.to_string();
            assert!(error.contains(TOKEN) && error.contains("nothing was touched"), "{error}");
            assert_eq!(std::fs::read(&path).unwrap(), data, "nothing was touched");
            return;
        }
    };
    let value: Value = serde_json::from_slice(data).unwrap();
    assert_eq!((lease.version, &value["version"]), (VERSION, &Value::from(VERSION)));
    state.store.put(&state.lock, TOKEN, &lease).unwrap();
    assert_eq!(state.store.get::<Lease>(TOKEN, VERSION).unwrap().as_ref(), Some(&lease), "as it was written");
    // What a newer version adds is not thrown away by rewriting it: the record is refused as a whole.
    let mut newer = serde_json::to_value(&lease).unwrap();
    newer["added"] = Value::Null;
    state.store.put(&state.lock, TOKEN, &newer).unwrap();
    assert!(state.store.get::<Lease>(TOKEN, VERSION).is_err(), "an unknown field");
    newer.as_object_mut().unwrap().remove("added");
    newer["version"] = (VERSION + 1).into();
    state.store.put(&state.lock, TOKEN, &newer).unwrap();
    assert!(state.store.get::<Lease>(TOKEN, VERSION).is_err(), "an unknown version");
    // What people are told of it.
    let said = [lease.held_by(), lease.uuids(), lease.profiles()];
    assert!(said.iter().all(|text| text.len() <= 4 * data.len() + 64));
    assert!(lease.minors().count() <= 2 * lease.slices.len());
}
