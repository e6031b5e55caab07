//! The node's credential from a docker config.json, with and without helpers.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::credential::{Account, Secret};
use super::docker_config::DockerConfig;
use super::*;

async fn account(directory: &Path, config: &str, registry: &str) -> Result<Option<Account>, OriginError> {
    let path = directory.join("config.json");
    std::fs::write(&path, config).unwrap();
    DockerConfig::new(path, &registry.parse().unwrap()).get(None).await
}

#[tokio::test]
async fn entries_are_found_under_the_names_that_docker_writes() {
    let directory = tempfile::tempdir().unwrap();
    let wanted = Some(Account::Password(Basic::of("user", "hunter2")));
    for (config, registry) in [
        (r#"{"auths":{"reg.example":{"auth":"dXNlcjpodW50ZXIy"}}}"#, "reg.example"),
        (r#"{"auths":{"https://reg.example/v1/":{"username":"user","password":"hunter2"}}}"#, "reg.example"),
        (r#"{"auths":{"https://index.docker.io/v1/":{"auth":"dXNlcjpodW50ZXIy"}}}"#, "docker.io"),
        (r#"{"auths":{"reg.example:5000":{"auth":"dXNlcjpodW50ZXIy"}},"x":1}"#, "reg.example:5000"),
    ] {
        assert_eq!(account(directory.path(), config, registry).await.unwrap(), wanted, "{config}");
    }
    // docker keeps the user beside it, with no password.
    let config = r#"{"auths":{"reg.example":{"auth":"dXNlcjo=","identitytoken":"hunter2"}}}"#;
    let found = account(directory.path(), config, "reg.example").await.unwrap();
    assert_eq!(found, Some(Account::Identity(Secret::new("hunter2"))));
    assert!(!format!("{found:?}").contains("hunter2"));
    assert_eq!(account(directory.path(), r#"{"auths":{}}"#, "reg.example").await.unwrap(), None);
    let error = account(directory.path(), r#"{"auths":{"reg.example":"hunter2"}}"#, "reg.example").await.unwrap_err();
    assert!(!printed(&error).contains("hunter2"), "{error:?}");
}

/// Helpers are found by PATH, which a test must not change: they are run by their whole path here.
async fn helper(directory: &Path, script: &str) -> Result<Option<Account>, OriginError> {
    let program = directory.join("docker-credential-test");
    std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    loop {
        match docker_config::helped(program.to_str().unwrap(), "reg.example").await {
            // A process that another test forks holds the file open for a moment.
            Err(OriginError::Helper { source: Some(error), .. })
                if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {}
            outcome => return outcome,
        }
    }
}

#[tokio::test]
async fn a_helper_is_asked_for_the_registry() {
    let directory = tempfile::tempdir().unwrap();
    let script = r#"[ "$1" = get ] || exit 3; read -r host; printf '{"ServerURL":"%s","Username":"%s","Secret":"hunter2"}' "$host" "$host""#;
    let found = helper(directory.path(), script).await.unwrap();
    assert_eq!(found, Some(Account::Password(Basic::of("reg.example", "hunter2"))));
    let identity = helper(directory.path(), r#"echo '{"Username":"<token>","Secret":"hunter2"}'"#).await.unwrap();
    assert_eq!(identity, Some(Account::Identity(Secret::new("hunter2"))));
    let none = helper(directory.path(), "echo credentials not found in native keychain; exit 1").await;
    assert_eq!(none.unwrap(), None);
    for script in ["echo hunter2; exit 1", "echo hunter2", "exec sleep 60"] {
        let error = helper(directory.path(), script).await.unwrap_err();
        assert!(matches!(error, OriginError::Helper { .. }), "{script}: {error:?}");
        assert!(!printed(&error).contains("hunter2"), "{error:?}");
    }
}

#[tokio::test]
async fn a_helper_has_no_path_in_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let error = account(directory.path(), r#"{"credsStore":"x/../../sh"}"#, "reg.example").await.unwrap_err();
    assert!(matches!(error, OriginError::Helper { .. }), "{error:?}");
}
