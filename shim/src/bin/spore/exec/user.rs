//! Who the command runs as: names are looked up in the container's own files, as Docker does.

use serde_json::{Value, json};
use spore_agent_api::files::MAX_CHUNK;

use crate::Global;
use crate::failure::Failure;
use crate::remote::Remote;

/// The OCI user object for `USER[:GROUP]`.
pub(super) async fn find(
    global: &Global,
    container: &str,
    wanted: &str,
    base: &Value,
) -> Result<Value, Failure> {
    let (passwd, group) = if needs_files(wanted) {
        let remote = Remote::connect(global, container).await?;
        (read(&remote, b"/etc/passwd").await?, read(&remote, b"/etc/group").await?)
    } else {
        (String::new(), String::new())
    };
    let mut user = resolve(wanted, &passwd, &group)
        .map_err(|detail| Failure::Container { id: container.into(), detail })?;
    if let Some(umask) = base.get("umask") {
        user["umask"] = umask.clone();
    }
    Ok(user)
}

fn is_number(text: &str) -> bool {
    text.parse::<u32>().is_ok()
}

/// Two numbers say it all.
fn needs_files(wanted: &str) -> bool {
    !wanted.split_once(':').is_some_and(|(user, group)| is_number(user) && is_number(group))
}

async fn read(remote: &Remote, path: &[u8]) -> Result<String, Failure> {
    match remote.read(path, 0, MAX_CHUNK, false).await {
        Ok(piece) => Ok(String::from_utf8_lossy(&piece.data).into_owned()),
        Err(failure) if failure.is_not_found() => Ok(String::new()),
        Err(failure) => Err(failure),
    }
}

/// By passwd(5) and group(5).
fn resolve(wanted: &str, passwd: &str, group: &str) -> Result<Value, String> {
    let fields = |text: &'_ str| -> Vec<Vec<String>> {
        text.lines().map(|line| line.split(':').map(str::to_owned).collect()).collect()
    };
    let (users, groups) = (fields(passwd), fields(group));
    let field = |row: &[String], index: usize| row.get(index).cloned().unwrap_or_default();
    let (user, wanted_group) =
        wanted.split_once(':').map_or((wanted, None), |(user, group)| (user, Some(group)));

    let entry = users.iter().find(|row| field(row, 0) == user || is_number(user) && field(row, 2) == user);
    let uid = entry.and_then(|row| field(row, 2).parse::<u32>().ok()).or_else(|| user.parse().ok());
    let uid = uid.ok_or_else(|| format!("user {user:?} is not in its /etc/passwd"))?;
    let gid = match wanted_group {
        None => entry.and_then(|row| field(row, 3).parse::<u32>().ok()).unwrap_or(0),
        Some(name) => {
            let entry = groups.iter().find(|row| field(row, 0) == name).map(|row| field(row, 2));
            let gid = entry.and_then(|gid| gid.parse::<u32>().ok()).or_else(|| name.parse().ok());
            gid.ok_or_else(|| format!("group {name:?} is not in its /etc/group"))?
        }
    };
    let mut more = Vec::new();
    if let (Some(row), None) = (entry, wanted_group) {
        let name = field(row, 0);
        let member = |row: &&Vec<String>| field(row, 3).split(',').any(|member| member == name);
        more.extend(groups.iter().filter(member).filter_map(|row| field(row, 2).parse::<u32>().ok()));
        more.retain(|found| *found != gid);
    }
    Ok(json!({ "uid": uid, "gid": gid, "additionalGids": more }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:100::/home:/bin/sh\nbroken\n";
    const GROUP: &str = "root:x:0:\nwheel:x:10:root,user\nusers:x:100:user\n";

    #[test]
    fn users_are_found_by_name_and_number() {
        let found = |wanted| resolve(wanted, PASSWD, GROUP);
        assert_eq!(found("user").unwrap(), json!({ "uid": 1000, "gid": 100, "additionalGids": [10] }));
        assert_eq!(found("1000").unwrap(), json!({ "uid": 1000, "gid": 100, "additionalGids": [10] }));
        assert_eq!(found("user:wheel").unwrap(), json!({ "uid": 1000, "gid": 10, "additionalGids": [] }));
        assert_eq!(found("4242").unwrap(), json!({ "uid": 4242, "gid": 0, "additionalGids": [] }));
        assert_eq!(found("7:8").unwrap(), json!({ "uid": 7, "gid": 8, "additionalGids": [] }));
        assert!(found("nobody").unwrap_err().contains("/etc/passwd"));
        assert!(found("root:nobody").unwrap_err().contains("/etc/group"));
        assert!(needs_files("7") && needs_files("a:7") && !needs_files("7:8"));
    }
}
