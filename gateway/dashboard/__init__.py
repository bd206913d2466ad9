"""The dashboard's files: a front end without a build, served by the admin listener (`gateway.admin.pages`)."""
