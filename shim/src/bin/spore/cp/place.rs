//! What goes where: `docker cp`'s rules (Docker CLI reference, "docker container cp").

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use crate::failure::Failure;
use crate::fs::absolute;

/// One argument.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Side {
    Host(OsString),
    Container { id: String, path: Vec<u8> },
}

/// An argument with a colon names a container, unless it begins like a path.
pub(super) fn side(argument: &OsStr) -> Result<Side, Failure> {
    let bytes = argument.as_bytes();
    if bytes == b"-" {
        return Err(Failure::Usage(
            "\"-\": tar streams are not supported; use \"spore fs cat\" and \"put\"".into(),
        ));
    }
    if bytes.is_empty() {
        return Err(Failure::Usage("an empty path".into()));
    }
    let colon = bytes.iter().position(|byte| *byte == b':');
    let Some(colon) = colon.filter(|_| !matches!(bytes[0], b'/' | b'.')) else {
        return Ok(Side::Host(argument.to_owned()));
    };
    let (id, path) = (&bytes[..colon], &bytes[colon + 1..]);
    if id.is_empty() || path.is_empty() {
        let shown = crate::show::name(bytes);
        return Err(Failure::Usage(format!(
            "\"{shown}\": CONTAINER:PATH needs both; a file of that name is \"./{shown}\""
        )));
    }
    let path = absolute(&OsString::from_vec(path.to_vec()));
    Ok(Side::Container { id: String::from_utf8_lossy(id).into_owned(), path })
}

/// A source that ends like a directory is what a link of that name points to.
pub(super) fn follows(source: &[u8]) -> bool {
    source.ends_with(b"/") || means_content(source)
}

/// `DIRECTORY/.`: what is in it, not the directory.
fn means_content(source: &[u8]) -> bool {
    source == b"." || source.ends_with(b"/.") || source.ends_with(b":.")
}

/// The name that a copy gets inside a directory; none for a root or a way upwards.
fn name(source: &[u8]) -> Option<&[u8]> {
    let last = source.split(|byte| *byte == b'/').rfind(|name| !name.is_empty())?;
    (last != b"." && last != b"..").then_some(last)
}

/// What is found at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum There {
    Nothing,
    Directory,
    Other,
}

/// Where the source itself goes, or why it cannot.
pub(super) fn target(
    source: &[u8],
    source_is_directory: bool,
    destination: &[u8],
    there: There,
) -> Result<Vec<u8>, &'static str> {
    let end = destination.iter().rposition(|byte| *byte != b'/').map_or(1, |last| last + 1);
    let bare = destination[..end.min(destination.len())].to_vec();
    let like_a_directory = destination.ends_with(b"/") || means_content(destination);
    match (source_is_directory, there) {
        (true, There::Nothing) => Ok(bare),
        (true, There::Other) => Err("is a file; a directory cannot be copied onto it"),
        (false, There::Nothing) if like_a_directory => Err("the directory does not exist"),
        (false, There::Other) if like_a_directory => Err("is not a directory"),
        (false, There::Nothing | There::Other) => Ok(bare),
        (true, There::Directory) if means_content(source) => Ok(bare),
        (_, There::Directory) => Ok(match name(source) {
            Some(name) => super::join(&bare, name),
            None => bare,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(source: &str, directory: bool, destination: &str, there: There) -> Result<String, &'static str> {
        target(source.as_bytes(), directory, destination.as_bytes(), there)
            .map(|path| String::from_utf8(path).unwrap())
    }

    #[test]
    fn arguments_name_a_container_or_the_host() {
        let container = |id: &str, path: &str| Side::Container { id: id.into(), path: path.into() };
        let host = |path: &str| Side::Host(path.into());
        for (argument, expected) in [
            ("web:/etc/passwd", container("web", "/etc/passwd")),
            ("web:tmp/", container("web", "/tmp/")),
            ("web:/a:b", container("web", "/a:b")),
            ("./a:b", host("./a:b")),
            ("/a:b", host("/a:b")),
            ("../x", host("../x")),
            ("plain", host("plain")),
        ] {
            assert_eq!(side(OsStr::new(argument)).unwrap(), expected, "{argument}");
        }
        for bad in ["-", "", ":/x", "web:"] {
            assert_eq!(side(OsStr::new(bad)).unwrap_err().status(), 2, "{bad}");
        }
    }

    #[test]
    fn a_file_goes_where_dockers_goes() {
        assert_eq!(to("/a/f", false, "/x/g", There::Nothing), Ok("/x/g".into()));
        assert_eq!(to("/a/f", false, "/x/g/", There::Nothing), Err("the directory does not exist"));
        assert_eq!(to("/a/f", false, "/x/g", There::Other), Ok("/x/g".into()));
        assert_eq!(to("/a/f", false, "/x/g/", There::Other), Err("is not a directory"));
        assert_eq!(to("/a/f", false, "/x", There::Directory), Ok("/x/f".into()));
        assert_eq!(to("f", false, "/", There::Directory), Ok("/f".into()));
        assert_eq!(to("f", false, ".", There::Directory), Ok("./f".into()));
    }

    #[test]
    fn a_directory_goes_where_dockers_goes() {
        assert_eq!(to("/a/d", true, "/x/new", There::Nothing), Ok("/x/new".into()));
        assert_eq!(to("/a/d/", true, "/x/new/", There::Nothing), Ok("/x/new".into()));
        assert_eq!(to("/a/d/.", true, "/x/new", There::Nothing), Ok("/x/new".into()));
        assert!(to("/a/d", true, "/x", There::Other).is_err());
        assert_eq!(to("/a/d", true, "/x", There::Directory), Ok("/x/d".into()));
        assert_eq!(to("/a/d/", true, "/x/", There::Directory), Ok("/x/d".into()));
        assert_eq!(to("/a/d/.", true, "/x", There::Directory), Ok("/x".into()));
        assert_eq!(to("/", true, "/x", There::Directory), Ok("/x".into()));
        assert_eq!(to(".", true, "/x", There::Directory), Ok("/x".into()));
        assert_eq!(to("..", true, "/x", There::Directory), Ok("/x".into()));
    }

    #[test]
    fn links_are_followed_where_the_path_says_so() {
        assert!(follows(b"d/") && follows(b"d/.") && follows(b".") && follows(b"web:."));
        assert!(!follows(b"d") && !follows(b"/d/x"));
    }
}
