use super::*;

#[test]
fn slots_that_share_a_line_share_its_descriptor() {
    let (mut lines, mut registered) = (Lines::default(), Vec::new());
    let mut get = |slot| {
        let gsi = slots::gsi(slot);
        lines.get("a test", gsi, |line| {
            registered.push((gsi, line.try_clone().unwrap()));
            Ok(())
        })
    };
    let (first, sharer, other) = (get(0).unwrap(), get(18).unwrap(), get(1).unwrap());
    assert_eq!(registered.iter().map(|(gsi, _)| *gsi).collect::<Vec<_>>(), [6, 7]);
    first.write(1).unwrap();
    sharer.write(1).unwrap();
    assert_eq!(registered[0].1.read().unwrap(), 2, "no edge is lost");
    assert!(registered[1].1.read().is_err(), "the other line is silent");
    drop(other);
}

#[test]
fn a_line_that_was_not_registered_is_not_kept() {
    let mut lines = Lines::default();
    let failed = lines.get("a test", 6, |_| Err(kvm_error("a test")(kvm_ioctls::Error::new(5))));
    assert!(failed.is_err());
    let mut registered = false;
    lines
        .get("a test", 6, |_| {
            registered = true;
            Ok(())
        })
        .unwrap();
    assert!(registered);
}
