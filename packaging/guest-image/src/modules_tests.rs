use super::*;

const DEP: &str = "\
kernel/fs/erofs/erofs.ko.xz: kernel/lib/libcrc32c.ko.xz
kernel/lib/libcrc32c.ko.xz:
kernel/net/vmw_vsock/vmw_vsock_virtio_transport.ko.xz: kernel/net/vmw_vsock/vmw_vsock_virtio_transport_common.ko.xz kernel/net/vmw_vsock/vsock.ko.xz
kernel/net/vmw_vsock/vmw_vsock_virtio_transport_common.ko.xz: kernel/net/vmw_vsock/vsock.ko.xz
kernel/net/vmw_vsock/vsock.ko.xz:
kernel/drivers/char/hw_random/virtio-rng.ko.xz:
kernel/crypto/crc32c-fast.ko.xz:
kernel/a.ko: kernel/b.ko
kernel/b.ko: kernel/a.ko
kernel/before.ko:
kernel/after.ko: kernel/middle.ko
kernel/middle.ko:
kernel/odd.ko:
kernel/needs-odd.ko: kernel/odd.ko
";
const SOFT: &str = "\
# Soft dependencies extracted from modules themselves.
softdep libcrc32c pre: crc32c
softdep middle ignored pre: before missing-one post: after
softdep odd pre: needs-odd
";

fn tree() -> Tree {
    let mut tree = Tree::parse(DEP, "kernel/fs/ext4/ext4.ko\n", SOFT, Path::new("modules.dep")).unwrap();
    tree.release = "6.12".to_owned();
    tree
}

fn want(names: &[&str]) -> Vec<Wanted> {
    let text: String = names.iter().map(|name| format!("{name} # test\n")).collect();
    parse_list(&text, Path::new("modules")).unwrap()
}

fn names(closure: &Closure) -> Vec<&str> {
    closure.modules.iter().map(|module| module.name.as_str()).collect()
}

#[test]
fn dependencies_come_first_and_once() {
    let closure =
        tree().closure(&want(&["vmw_vsock_virtio_transport", "erofs", "vsock", "virtio_rng"])).unwrap();
    assert_eq!(
        names(&closure),
        [
            "vsock",
            "vmw_vsock_virtio_transport_common",
            "vmw_vsock_virtio_transport",
            "libcrc32c",
            "erofs",
            "virtio_rng"
        ]
    );
    assert_eq!(closure.modules[3].reason, "needed by erofs");
    assert_eq!(closure.modules[5].path, "kernel/drivers/char/hw_random/virtio-rng.ko.xz");
    assert_eq!(closure.unresolved, ["crc32c (of libcrc32c)"]);
}

#[test]
fn a_built_in_module_needs_no_file() {
    let closure = tree().closure(&want(&["ext4"])).unwrap();
    assert_eq!(closure, Closure { built_in: vec!["ext4".to_owned()], ..Closure::default() });
}

#[test]
fn soft_dependencies_surround_their_module() {
    let closure = tree().closure(&want(&["middle"])).unwrap();
    assert_eq!(names(&closure), ["before", "middle", "after"]);
    assert_eq!(closure.unresolved, ["missing_one (of middle)"]);
}

#[test]
fn a_soft_dependency_on_its_own_user_is_no_circle() {
    let closure = tree().closure(&want(&["odd", "needs-odd"])).unwrap();
    assert_eq!(names(&closure), ["odd", "needs_odd"]);
}

#[test]
fn an_alias_gives_its_modules_unless_built_in_code_answers_it() {
    let mut tree = tree();
    tree.parse_aliases("alias crc32c crc32c_fast\nalias pci:v*d* other\n", "");
    assert_eq!(names(&tree.closure(&want(&["libcrc32c"])).unwrap()), ["crc32c_fast", "libcrc32c"]);
    tree.parse_aliases("", "crc32c_generic.license=GPL\0crc32c_generic.alias=crc32c\0");
    let closure = tree.closure(&want(&["libcrc32c"])).unwrap();
    assert_eq!(names(&closure), ["libcrc32c"]);
    assert!(closure.unresolved.is_empty());
}

#[test]
fn missing_and_circular_modules_are_errors() {
    let error = tree().closure(&want(&["virtio_mmio"])).unwrap_err().to_string();
    assert!(error.contains("'virtio_mmio' (test)") && error.contains("6.12"), "{error}");
    assert!(matches!(tree().closure(&want(&["a"])), Err(Error::ModuleCycle { .. })));
    let tree = Tree::parse("kernel/x.ko: kernel/y.ko\n", "", "", Path::new("modules.dep")).unwrap();
    let error = tree.closure(&want(&["x"])).unwrap_err().to_string();
    assert!(error.contains("'y' (needed by x)"), "{error}");
}

#[test]
fn paths_that_leave_the_directory_are_refused() {
    for text in ["/etc/passwd:\n", "../x.ko:\n", "kernel/x.ko: ../../y.ko\n", "no colon\n", ":\n"] {
        let result = Tree::parse(text, "", "", Path::new("modules.dep"));
        assert!(matches!(result, Err(Error::Syntax { line: 1, .. })), "{text:?}");
    }
}

#[test]
fn the_list_wants_a_reason_for_every_module() {
    let list = parse_list("# head\n\nvirtio-rng  # entropy\n", Path::new("modules")).unwrap();
    let entropy = |group: Option<&str>| Wanted {
        name: "virtio_rng".to_owned(),
        group: group.map(str::to_owned),
        reason: "entropy".to_owned(),
    };
    assert_eq!(list, [entropy(None)]);
    let list = parse_list("virtio-rng @later # entropy\n", Path::new("modules")).unwrap();
    assert_eq!(list, [entropy(Some("later"))]);
    for text in [
        "a @ # x\n",
        "a @B # x\n",
        "a @b/c # x\n",
        "erofs\n",
        "erofs #\n",
        "# ok\na # x\na # y\n",
        "fs/erofs # path\n",
        "a b # two\n",
    ] {
        assert!(matches!(parse_list(text, Path::new("modules")), Err(Error::Syntax { .. })), "{text:?}");
    }
}

#[test]
fn a_group_lacks_what_is_loaded_at_boot_already() {
    let list = parse_list(
        "erofs @later # one\nvsock # two\nvmw_vsock_virtio_transport @later # three\n",
        Path::new("modules"),
    );
    let closure = tree().closure(&list.unwrap()).unwrap();
    let group_of =
        |name: &str| closure.modules.iter().find(|module| module.name == name).unwrap().group.as_deref();
    assert_eq!((group_of("vsock"), group_of("erofs")), (None, Some("later")));
    assert_eq!(group_of("vmw_vsock_virtio_transport"), Some("later"));
}

#[test]
fn the_packaged_list_parses() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("modules");
    let list = parse_list(&std::fs::read_to_string(&path).unwrap(), &path).unwrap();
    assert!(list.iter().any(|module| module.name == "virtio_mmio"));
}
