//! Names for snapshots.

use std::time::{Duration, SystemTime};

use super::*;

#[test]
fn a_template_has_all_of_its_snapshot_and_outlives_it() {
    let place = Place::new();
    let disk = place.disk_file("disk", 3);
    let made = make(&place.store, "first", &disk).unwrap();
    let template = place.store.name_template(made.id, "warm").unwrap();
    assert_ne!(template.id, made.id);
    assert_eq!((template.purpose, template.name.as_deref()), (Purpose::Template, Some("warm")));
    assert_eq!((&template.layers, &template.disks), (&made.layers, &made.disks));
    assert_eq!(place.store.size(template.id).own, place.store.size(made.id).own, "files are shared");
    place.store.remove(made.id).unwrap();
    let opened = place.store.open(place.store.find("warm").unwrap()).unwrap();
    opened.verify().unwrap();
    assert_eq!(opened.state, b"state of the VMM");
    assert_eq!(place.store.templates().unwrap().len(), 1);
    let all = Policy { max_age: Some(Duration::ZERO), only: Some(Purpose::Template), ..Policy::default() };
    let later = SystemTime::now() + Duration::from_secs(1);
    assert_eq!(place.store.prune(&all, 0, later).unwrap().removed, [template.id]);
    assert!(place.names().is_empty());
}

#[test]
fn a_template_of_elsewhere_is_refused() {
    let place = Place::new();
    let made = make(&place.store, "first", &place.disk_file("disk", 3)).unwrap();
    let template = place.store.name_template(made.id, "warm").unwrap();
    let mut tar = Vec::new();
    export_tar(&place.store.open(template.id).unwrap(), &mut tar).unwrap();
    let other = Place::new();
    let refused = import_tar(&other.store, &mut &tar[..], &Policy::default()).unwrap_err().to_string();
    assert!(refused.contains("it is a template of another host"), "{refused}");
    assert!(other.names().is_empty());
}

#[test]
fn a_name_is_one_templates_and_no_id() {
    let place = Place::new();
    let disk = place.disk_file("disk", 3);
    let made = make(&place.store, "first", &disk).unwrap();
    let refused = |name: &str| place.store.name_template(made.id, name).unwrap_err().to_string();
    assert!(refused("first").contains(&format!("template \"first\": snapshot {} has this name", made.id)));
    for bad in ["", "-x", ".x", "a/b", "a b", "é", &"x".repeat(65)] {
        assert!(refused(bad).contains("are allowed"), "{bad}");
    }
    for id in ["cafe", "0123", "a"] {
        assert!(refused(id).contains("a snapshot's id"), "{id}");
    }
    assert_eq!(place.names(), [made.id.to_string()]);
    place.store.name_template(made.id, "cafe-1").unwrap();
    assert!(refused("cafe-1").contains("has this name"));
    assert!(matches!(place.store.find_template(&made.id.to_string()), Err(StoreError::NoTemplate { .. })));
    assert!(matches!(place.store.find_template("first"), Err(StoreError::NoSuch { .. })));
    place.store.find_template("cafe-1").unwrap();
}
