// Package deploy tests what administrators of clusters apply: manifests are built
// by kustomize and decoded strictly, alerts fire and stay silent in promtool, metrics
// in alerts and dashboard are documented ones, and the plugin for
// node-problem-detector reports what a daemon knows. The script of the DaemonSet is
// started with a containerd in package configs.
//
//	go test -count=1 -v ./deploy -run TestAlerts
package deploy
